"""Prompts for the models: templates (data, in YAML) that are filled with an example."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from lmcot.config import ASPECTS, Aspect, read_yaml_mapping
from lmcot.config.base import Settings
from lmcot.config.prompts import (
    Demonstration,
    GuidedKind,
    PromptKind,
    PromptSettings,
    QuestionDemonstration,
)
from lmcot.data.context import render_context
from lmcot.errors import UserError
from lmcot.records import Example, Message, Paragraph, Prompt, Sampling
from lmcot.storage import place
from lmcot.text.reading import without_conclusion

if TYPE_CHECKING:
    from lmcot.storage import Place

_FIELD = re.compile(r"\{(\w+)\}")
_REQUIRED = {
    "rationale": {"question"},
    "advice": {"question", "first_answer"},
    "standard": {"question"},
    "cot": {"question"},
    "guided": {"question", "rationale"},
    "rationale_only": {"question", "rationale"},
    "advised": {"question", "first_answer", "rationale"},
    "judge": {"question", "rationale", "criterion"},
}
"""Fields that the ``user`` text of each kind must hold; ``context`` it may hold, except in
``rationale_only``."""


class Template(Settings):
    """One kind of question: an optional system line and the user's text."""

    system: str = ""
    """System message, sent unchanged; empty: none is sent."""
    user: str
    """The question, with fields in braces."""


class DemonstratedTemplate(Template):
    """A kind of question that may come with demonstrations."""

    assistant: str
    """The reply in a demonstration: ``{answer}``, ``{rationale}`` or both."""
    stop: tuple[str, ...] | None = None
    """The reply, without hidden thinking and blank lines at its start, ends before the first of
    these. Unset: without a chat template it ends before a blank line, after which a base model
    writes a question of its own; models with a chat template, and chat endpoints, end by
    themselves."""


class JudgeTemplate(Template):
    """The yes/no questions about a rationale."""

    aspects: dict[Aspect, str] = Field(default_factory=dict, validate_default=True)
    """The text of ``{criterion}`` for each aspect; an aspect that is left out keeps its own
    question."""

    @field_validator("aspects")
    @classmethod
    def _every_aspect_has_a_question(cls, given: dict[Aspect, str]) -> dict[Aspect, str]:
        # The file's own come first: one that names all aspects is dumped as it is written.
        return given | {name: one.question for name, one in ASPECTS.items() if name not in given}


class TemplateFile(Settings):
    """A templates file as it is written."""

    rationale: Template
    """To the small LM: write a rationale."""
    standard: DemonstratedTemplate
    """To the frozen LM: answer."""
    cot: DemonstratedTemplate
    """To the frozen LM: reason, then answer."""
    guided: DemonstratedTemplate
    """To the frozen LM: answer, given a rationale."""
    rationale_only: DemonstratedTemplate | None = None
    """To the frozen LM: answer, given a rationale and no context. Unset: as ``guided``, without the
    paragraph of its text that holds ``{context}``."""
    advice: Template | None = None
    """To the small LM, with ``prompts.guidance: advice``: advise on the frozen LM's first
    answer."""
    advised: DemonstratedTemplate | None = None
    """To the frozen LM, with ``prompts.guidance: advice``: answer again, given the first answer and
    the advice, which is ``{rationale}``."""
    judge: JudgeTemplate
    """To the frozen LM: is this rationale good in one respect?"""
    demonstrations: tuple[Demonstration, ...] = ()
    """Worked examples for the frozen LM."""

    @model_validator(mode="after")
    def _fields_fit(self) -> TemplateFile:
        for kind, required in _REQUIRED.items():
            template = getattr(self, kind)
            if template is None:
                continue
            context = set() if kind == "rationale_only" else {"context"}
            _check_fields(f"{kind}.system", template.system, set(), set())
            _check_fields(f"{kind}.user", template.user, required, required | context)
            if isinstance(template, DemonstratedTemplate):
                allowed = {"answer", "rationale"}
                _check_fields(f"{kind}.assistant", template.assistant, set(), allowed)
        return self

    def for_frozen(self, kind: PromptKind, *, advised: bool = False) -> DemonstratedTemplate:
        """The template of one kind of question to the frozen LM.

        Args:
            advised: whether guided questions show a first answer and advice on it.
        """
        if advised and self.advised is not None and kind in get_args(GuidedKind):
            text = self.advised.user
            shown = text if kind == "guided" else _without(text, "context")
            return self.advised.model_copy(update={"user": shown})
        match kind:
            case "standard":
                return self.standard
            case "cot":
                return self.cot
            case "guided":
                return self.guided
            case "rationale_only":
                alone = {"user": _without(self.guided.user, "context")}
                return self.rationale_only or self.guided.model_copy(update=alone)

    def as_text(self, *, rationale_only: bool, advice: bool = False) -> str:
        """Everything that prompts are made of, as one text for digests.

        Args:
            rationale_only: whether the template of that name is used; files of earlier versions
                lack it.
            advice: likewise the templates ``advice`` and ``advised``.
        """
        unused = {"rationale_only"} if not rationale_only else set()
        unused |= {"advice", "advised"} if not advice else set()
        return self.model_dump_json(exclude=unused or None)


@dataclass(frozen=True)
class PromptTemplates:
    """Builds the prompts of all kinds; text that is filled in is never read as a template."""

    name: str
    """Name or path of the templates file."""
    file: TemplateFile
    """The parsed templates file."""
    demonstrations: tuple[Demonstration, ...] = ()
    """The worked examples that the frozen LM is shown before a question."""
    nearest: Callable[[str], Sequence[Demonstration]] | None = None
    """Chooses those that a question is shown with; None: all of them."""
    conclusions: bool = True
    """Whether guided prompts show the sentences in which a rationale states its answer."""
    advises: bool = False
    """Whether the small LM advises on a first answer of the frozen LM."""

    def showing(self, count: int) -> PromptTemplates:
        """The templates with the first ``count`` demonstrations of their file.

        Raises:
            UserError: if the file holds fewer.
        """
        available = self.file.demonstrations
        if count > len(available):
            raise UserError(
                f"prompts.demonstrations is {count}, but the templates '{self.name}' hold "
                f"{len(available)}: lower it, or add demonstrations"
            )
        return replace(self, demonstrations=available[:count])

    def shown(self, question: str) -> Sequence[Demonstration]:
        """The demonstrations that come before a question."""
        return self.demonstrations if self.nearest is None else self.nearest(question)

    def as_text(self, *, rationale_only: bool) -> str:
        """As `TemplateFile.as_text`, with the demonstrations that the file does not hold."""
        file = self.file.as_text(rationale_only=rationale_only, advice=self.advises)
        drawn = [one for one in self.demonstrations if isinstance(one, QuestionDemonstration)]
        return "\n".join([file, *(one.model_dump_json() for one in drawn)])

    @property
    def for_small(self) -> Template:
        """The template of what the small LM is asked."""
        return self.file.advice if self.advises and self.file.advice else self.file.rationale

    def for_frozen(self, kind: PromptKind) -> DemonstratedTemplate:
        """The template of one kind of question to the frozen LM."""
        return self.file.for_frozen(kind, advised=self.advises)

    def rationale(self, example: Example) -> Prompt:
        """Asks the small LM for a rationale that ends in its answer, or for advice on the first
        answer of the frozen LM."""
        return _prompt(self.for_small, _fields(example))

    def standard(self, example: Example) -> Prompt:
        """Asks the frozen LM for the answer."""
        return self._demonstrated(self.file.standard, _fields(example))

    def cot(self, example: Example) -> Prompt:
        """Asks the frozen LM for a rationale that ends in its answer."""
        return self._demonstrated(self.file.cot, _fields(example))

    def guided(
        self,
        example: Example,
        rationale: str,
        kind: GuidedKind = "guided",
    ) -> Prompt:
        """Asks the frozen LM for the answer, given a rationale (or its first answer and advice),
        with the context or without it."""
        show = str if self.conclusions else without_conclusion
        fields = {**_fields(example), "rationale": show(rationale)}
        return self._demonstrated(self.for_frozen(kind), fields, show)

    def reply(self, template: DemonstratedTemplate, example: Example) -> str:
        """The right reply, in the form that demonstrations show; the rationale is left out."""
        fields = {"answer": example.answer.strip(), "rationale": ""}
        return _fill(template.assistant, fields)

    def judge(self, example: Example, rationale: str, aspect: Aspect) -> Prompt:
        """Asks the frozen LM whether a rationale is good in one respect: yes or no."""
        criterion = self.file.judge.aspects[aspect]
        fields = {**_fields(example), "rationale": rationale, "criterion": criterion}
        return _prompt(self.file.judge, fields)

    def _demonstrated(
        self,
        template: DemonstratedTemplate,
        fields: Mapping[str, str],
        show: Callable[[str], str] = str,
    ) -> Prompt:
        """The prompt with its demonstrations, of whose rationales ``show`` makes what is shown."""
        shown: list[Message] = []
        for demonstration in self.shown(fields["question"]):
            values = _values(demonstration)
            values["rationale"] = show(values["rationale"])
            shown.append(Message("user", _user(template, values)))
            shown.append(Message("assistant", _fill(template.assistant, values)))
        return _prompt(template, fields, tuple(shown))


def reply_sampling(template: DemonstratedTemplate, max_new_tokens: int) -> Sampling:
    """How the frozen LM replies to rewards, annotation and evaluation alike: greedily."""
    return Sampling(max_new_tokens=max_new_tokens, stop=template.stop)


def templates_for(prompts: PromptSettings) -> PromptTemplates:
    """The templates that the settings name, used as they say; without demonstrations.

    Raises:
        UserError: as `load_templates` does, or if the file lacks templates of advice.
    """
    found = load_templates(prompts.templates)
    lacking = [name for name in ("advice", "advised") if getattr(found.file, name) is None]
    if prompts.advises and lacking:
        raise UserError(
            f"prompts.guidance is 'advice', but the templates '{prompts.templates}' lack the key "
            f"'{lacking[0]}': add it (those of lmcot have it), or set prompts.guidance to "
            "'rationale'"
        )
    return replace(found, conclusions=prompts.conclusion == "shown", advises=prompts.advises)


def load_templates(name_or_path: str) -> PromptTemplates:
    """Templates that come with lmcot, by name, or your own YAML file, by its path.

    Raises:
        UserError: if there is no such file, naming those that exist; or if a key of it is
            missing, unknown or wrong, naming the key.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        return _parse(name_or_path, place(name_or_path))
    folder = resources.files("lmcot.data") / "templates"
    names = sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.is_file())
    if name_or_path not in names:
        raise UserError(
            f"there are no templates named '{name_or_path}': use one of {', '.join(names)}, "
            "or the path of a .yaml file"
        )
    with resources.as_file(folder / f"{name_or_path}.yaml") as path:
        return _parse(name_or_path, path)


def _parse(name: str, path: Place) -> PromptTemplates:
    # As text: an answer such as 1945, 3.50 or no is what stands there.
    values = read_yaml_mapping(path, as_text=True)
    try:
        return PromptTemplates(name, TemplateFile.model_validate(values))
    except ValidationError as error:
        problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "missing":
        message = f"the key '{key}' is missing: add it"
    elif problem["type"] == "extra_forbidden":
        message = f"unknown key '{key}': remove it"
    elif key:
        message = f"'{key}' is wrong: {message[0].lower()}{message[1:]}"
    raise UserError(f"the templates file '{path}': {message}")


def _check_fields(key: str, text: str, required: set[str], allowed: set[str]) -> None:
    found = set(_FIELD.findall(text))
    for name in sorted(required - found):
        raise ValueError(f"'{key}' lacks the field {{{name}}}: add it")
    for name in sorted(found - allowed):
        known = ", ".join(f"{{{field}}}" for field in sorted(allowed)) or "no fields"
        raise ValueError(f"'{key}' has the field {{{name}}}, but it may hold {known}")


def _without(text: str, field: str) -> str:
    """A template's text without the paragraph that holds a field; if that paragraph holds other
    fields too, without the field alone."""
    kept = []
    for paragraph in text.split("\n\n"):
        if set(_FIELD.findall(paragraph)) != {field}:
            kept.append(paragraph.replace(f"{{{field}}}", "").strip())
    return "\n\n".join(kept)


def _fields(example: Example) -> dict[str, str]:
    return {
        "context": render_context(example.context),
        "question": example.question,
        "first_answer": example.first_answer,
    }


def _values(one: Demonstration) -> dict[str, str]:
    """The fields that a demonstration fills in a template."""
    context = [Paragraph(p.title, p.sentences) for p in one.context]
    return {
        "context": render_context(context),
        "question": one.question,
        "first_answer": "",
        "rationale": one.rationale,
        "answer": one.answer,
    }


def _prompt(template: Template, fields: Mapping[str, str], shown: Prompt = ()) -> Prompt:
    system = (Message("system", template.system),) if template.system else ()
    return (*system, *shown, Message("user", _user(template, fields)))


def _user(template: Template, fields: Mapping[str, str]) -> str:
    """The question; one without a context or a first answer goes without the paragraph that would
    hold it."""
    text = template.user
    for field in ("context", "first_answer"):
        if not fields[field]:
            text = _without(text, field)
    return _fill(text, fields)


def _fill(text: str, fields: Mapping[str, str]) -> str:
    # One pass over the template alone: braces in what is filled in stay what they are.
    return _FIELD.sub(lambda match: fields[match[1]], text).strip()
