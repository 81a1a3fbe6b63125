"""What the frozen LM is asked in a row of an evaluation, and as a teacher."""

from __future__ import annotations

from dataclasses import replace

from lmcot.config import Config, FrozenTeacher
from lmcot.config.prompts import PromptKind
from lmcot.config.rows import RowSpec
from lmcot.data.prompts import PromptTemplates, reply_sampling
from lmcot.data.sampler import sample_seed
from lmcot.errors import UserError
from lmcot.records import Example, Prompt, Sampling


def row_prompt(
    row: RowSpec, templates: PromptTemplates, example: Example, rationale: str
) -> Prompt:
    """A question's prompt in a row that asks the frozen LM; only guided prompts show a rationale.

    Raises:
        ValueError: if the row does not ask the frozen LM.
    """
    if row.prompt is None:
        raise ValueError(f"the row {row.name} does not ask the frozen LM")
    return frozen_prompt(row.prompt, templates, example, rationale)


def frozen_prompt(
    kind: PromptKind,
    templates: PromptTemplates,
    example: Example,
    rationale: str,
) -> Prompt:
    """A question's prompt of some kind; only guided prompts show a rationale."""
    match kind:
        case "standard":
            return templates.standard(example)
        case "cot":
            return templates.cot(example)
        case "guided" | "rationale_only":
            return templates.guided(example, rationale, kind)


def row_sampling(
    row: RowSpec, config: Config, templates: PromptTemplates, attempt: int
) -> Sampling:
    """How the frozen LM replies in a row that asks it.

    Args:
        attempt: number of the attempt, where several vote.

    Raises:
        UserError: if the settings have no frozen LM.
        ValueError: if the row does not ask the frozen LM.
    """
    if config.frozen is None:
        raise UserError("evaluate asks the frozen LM, but there is no 'frozen' section")
    if row.prompt is None:
        raise ValueError(f"the row {row.name} does not ask the frozen LM")
    reasons = row.prompt == "cot"
    limit = config.frozen.rationale_limit if reasons else config.frozen.answer_limit
    sampling = reply_sampling(templates.for_frozen(row.prompt), limit)
    if not row.samples_replies:
        return sampling
    # Nothing else differs between the attempts: the replies are what is sampled.
    return replace(
        sampling,
        temperature=config.evaluate.temperature,
        seed=sample_seed(config.seed, 0, row.name, attempt) % 2**31,
    )


def plain_prompt(templates: PromptTemplates, example: Example) -> Prompt:
    """A question's prompt to reason, without demonstrations and without a hint."""
    return replace(templates, demonstrations=(), nearest=None).cot(example)


def teacher_prompt(
    teacher: FrozenTeacher, templates: PromptTemplates, example: Example, *, hinted: bool
) -> Prompt:
    """A question's prompt to the frozen LM as a teacher.

    Args:
        hinted: whether the answer is given as a hint.
    """
    asked = teacher.with_hint(example) if hinted else example
    if not teacher.demonstrations:
        return plain_prompt(templates, asked)
    return _showing(templates, example).cot(asked)


def teacher_wording(
    teacher: FrozenTeacher, templates: PromptTemplates, example: Example, *, hinted: bool
) -> Prompt:
    """That prompt without the question and its passages."""
    shown = _showing(templates, example)
    return teacher_prompt(teacher, shown, without_text(example), hinted=hinted)


def without_text(example: Example) -> Example:
    """The question without its text and its passages."""
    return replace(example, question="", context=(), first_answer="")


def _showing(templates: PromptTemplates, example: Example) -> PromptTemplates:
    """The templates with the demonstrations that a question is shown, whatever is asked."""
    shown = tuple(templates.shown(example.question))
    return replace(templates, demonstrations=shown, nearest=None)


def teacher_sampling(
    teacher: FrozenTeacher, config: Config, templates: PromptTemplates, sample: int, *, hinted: bool
) -> Sampling:
    """How the frozen LM replies as a teacher.

    Raises:
        UserError: if the settings have no frozen LM.
    """
    if config.frozen is None:
        raise UserError("the teacher is the frozen LM, but there is no 'frozen' section")
    sampling = reply_sampling(templates.file.cot, config.frozen.rationale_limit)
    if teacher.temperature == 0:
        return sampling
    kind = "hinted" if hinted else "plain"
    seed = sample_seed(config.seed, 0, "annotate", kind, sample) % 2**31
    return replace(sampling, temperature=teacher.temperature, seed=seed)
