"""What is asked, over HTTP or in a program, and the answer that comes back."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lmcot.text.characters import check_printable


def _said(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


Text = Annotated[str, AfterValidator(check_printable)]


class Asked(BaseModel):
    """The base of all requests: unknown fields are refused, values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Passage(Asked):
    """One passage of a context."""

    title: Text = ""
    text: Text


class Question(Asked):
    """A question, and the context to answer it from."""

    question: Annotated[Text, AfterValidator(_said)] = Field(
        examples=["Which river does Elko straddle?"]
    )
    context: Text | list[Passage] = Field(
        default="",
        description="A text (blank lines separate passages), or passages.",
        examples=[[{"title": "Elko", "text": "Elko straddles the Humboldt River."}]],
    )


class Drawing(Asked):
    """How rationales are sampled."""

    samples: int = Field(default=1, ge=1, description="Number of rationales; their answers vote.")
    max_tokens: int | None = Field(default=None, ge=1, description="Longest rationale.")
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=10,
        allow_inf_nan=False,
        description="0 is greedy: the default for one sample.",
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**63, description="The same seed gives the same rationales."
    )


class AnswerRequest(Question, Drawing):
    """Asks for a guided answer."""

    unguided: bool = Field(default=False, description="Ask the frozen LM without guidance, too.")
    answer_schema: dict[str, Any] | None = Field(
        default=None, description="JSON schema of the object that holds the answer."
    )
    stream: bool = Field(default=False, description="Server-sent events, token by token.")


class Tokens(BaseModel):
    """Tokens that the models read and wrote."""

    small_lm_in: int
    small_lm_out: int
    large_lm_in: int
    large_lm_out: int


class Vote(BaseModel):
    """One rationale, and the answer that it led to."""

    rationale: str
    answer: str
    reply: str = Field(description="What the frozen LM wrote.")
    tokens: Tokens
    finish_reason: str = Field(description="How the rationale ended: eos or length.")
    answer_cut: bool = Field(
        default=False, description="Whether the answer reached its longest length."
    )
    failure: str | None = None


class Versions(BaseModel):
    """The models that answered."""

    small: str
    frozen: str


class Timings(BaseModel):
    """Seconds since the request came."""

    first_token: float | None = None
    rationale: float | None = None
    total: float


class AnswerResponse(BaseModel):
    """A guided answer."""

    id: str
    answer: str
    rationale: str = Field(description="A rationale that led to the answer.")
    rationale_cut: bool = Field(
        default=False, description="Whether this rationale reached its longest length."
    )
    answer_cut: bool = Field(
        default=False, description="Whether the answer reached its longest length."
    )
    confidence: float = Field(description="The answer's share of the votes.")
    structured: dict[str, Any] | None = Field(
        default=None, description="The answer as an object of `answer_schema`."
    )
    votes: list[Vote]
    unguided: str | None = Field(
        default=None, description="The frozen LM's answer without guidance."
    )
    first_answer: str | None = Field(
        default=None,
        description="What the frozen LM answered first, where the small LM advises on that.",
    )
    tokens: Tokens
    timings: Timings
    versions: Versions
