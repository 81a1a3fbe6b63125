"""Settings of the teachers, whose rationales the small LM learns."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator

from lmcot.config.base import Fraction, Settings

_FIELD: Final = re.compile(r"\{(\w*)\}")


class SupportingFactsTeacher(Settings):
    """Rationales made of the data set's own supporting facts, and the answer."""

    kind: Literal["supporting_facts"]
    template: str = "{facts} So the answer is {answer}."
    """Text of a rationale. ``{facts}`` are the sentences in the order of the context; ``{answer}``
    may be left out."""
    shorten: bool = True
    """Whether a rationale that is longer than ``policy.max_new_tokens`` loses the sentences that
    the answer does not need, until it fits; if not, it is rejected."""

    @field_validator("template")
    @classmethod
    def _has_the_facts(cls, template: str) -> str:
        fields = set(_FIELD.findall(template))
        if "facts" not in fields:
            raise ValueError("it lacks the field {facts}: add it")
        if unknown := fields - {"facts", "answer"}:
            raise ValueError(
                f"it has the field {{{min(unknown)}}}, but it may hold {{facts}} and {{answer}}"
            )
        return template

    def rationale(self, facts: str, answer: str) -> str:
        """The text of a rationale."""
        fields = {"facts": facts, "answer": answer}
        return _FIELD.sub(lambda match: fields[match[1]], self.template)


class FrozenTeacher(Settings):
    """Rationales that the frozen LM wrote; kept only where its answer is right (the paper's)."""

    kind: Literal["frozen"]
    min_f1: Fraction = 1.0
    """Kept if the prediction's F1 with the gold answer reaches this; 1.0 asks for exact match
    of the normalised words."""


Teacher = Annotated[SupportingFactsTeacher | FrozenTeacher, Field(discriminator="kind")]
