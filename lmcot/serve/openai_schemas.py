"""OpenAI's chat completions: what their clients send, and what they read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lmcot.answering.schemas import Text


class _NullIsAbsent(BaseModel):
    """OpenAI's fields are nullable: null means the same as leaving a field out."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None}


class ChatMessage(_NullIsAbsent):
    """One message of a conversation."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[dict[str, Any]] = Field(
        default="", description="A text, or parts of the type text."
    )


class StreamOptions(_NullIsAbsent):
    """What a stream reports besides the answer."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class NamedSchema(_NullIsAbsent):
    """A JSON schema with its name."""

    model_config = ConfigDict(extra="ignore")
    name: str = ""
    schema_: dict[str, Any] = Field(default_factory=lambda: {"type": "object"}, alias="schema")


class ResponseFormat(_NullIsAbsent):
    """The form of the answer."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class ToolFunction(_NullIsAbsent):
    """A function, and the JSON schema of its arguments."""

    model_config = ConfigDict(extra="ignore")
    name: str
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})


class Tool(_NullIsAbsent):
    """A tool that a client offers."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["function"] = "function"
    function: ToolFunction


class ChosenFunction(BaseModel):
    """The name of a function."""

    name: str


class ChosenTool(BaseModel):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: ChosenFunction


class ChatRequest(_NullIsAbsent):
    """`POST /v1/chat/completions`. Fields that would change the answer, but are not offered, are
    refused."""

    model_config = ConfigDict(extra="forbid")
    model: str = ""
    messages: list[ChatMessage] = Field(min_length=1, max_length=200)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float | None = Field(default=None, ge=0, le=10, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    max_tokens: int | None = Field(default=None, ge=1, description="Longest answer.")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The same.")
    seed: int | None = None
    stop: str | list[str] = Field(default=[], description="The answer ends before these.")
    response_format: ResponseFormat = ResponseFormat(type="text")
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | ChosenTool = "auto"

    samples: int = Field(default=1, ge=1, description="lmcot's own: rationales that vote.")
    max_rationale_tokens: int | None = Field(
        default=None, ge=1, description="lmcot's own: longest rationale."
    )

    n: int = Field(default=1, ge=1, description="1 only.")
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0)
    logit_bias: dict[str, float] = {}
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    functions: list[dict[str, Any]] = []
    function_call: str | dict[str, Any] = "auto"
    modalities: list[str] = ["text"]
    audio: dict[str, Any] = {}
    web_search_options: dict[str, Any] | None = None

    # Fields that are accepted and change nothing.
    metadata: dict[str, Any] = {}
    parallel_tool_calls: bool = True
    prediction: Any = None
    prompt_cache_key: str = ""
    prompt_cache_retention: str = ""
    reasoning_effort: str = ""
    safety_identifier: str = ""
    service_tier: str = ""
    store: bool = False
    user: str = ""
    verbosity: str = ""


class Usage(BaseModel):
    """Tokens of both models together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CalledFunction(BaseModel):
    """A function with its arguments, a JSON object as text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """The call of the one tool that had to be called."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str = Field(description="The rationale.")
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    """The only choice."""

    index: int = 0
    message: AssistantMessage
    finish_reason: FinishReason = Field(
        description="length: the rationale or the answer was cut at its longest length."
    )
    logprobs: None = None


class ChatCompletion(BaseModel):
    """A guided answer in OpenAI's form."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    """The trained pair as a model."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "lmcot"


class Models(BaseModel):
    """The list of models, which has one entry."""

    object: Literal["list"] = "list"
    data: list[Model]
