"""The exceptions that a user is meant to read, and how an error is put into one line."""


class UserError(Exception):
    """Something that the user can mend: bad settings, data, models or requests.

    Its message is one sentence that names what is wrong and what to do. The command line prints
    it without a traceback and ends with exit code 2.
    """


class Interrupted(Exception):
    """The user asked the run to end; what was done is kept, and the same command goes on."""


def first_line(error: object) -> str:
    """The first line of what an error says; the name of its type if it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
