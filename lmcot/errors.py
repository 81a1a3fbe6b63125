"""The exceptions that a user is meant to read, and how an error is put into one line."""


class UserError(Exception):
    """A fault that the user can fix: bad settings, data, models or requests.

    Its message is one sentence that names what is wrong and what to do. The command line prints
    it without a traceback and ends with exit code 2.
    """


class Interrupted(Exception):
    """The user asked the run to end; progress is saved, and the same command resumes."""


def first_line(error: object) -> str:
    """The first line of an error's message, or its type's name if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
