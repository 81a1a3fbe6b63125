"""Settings of the frozen LM: a class for each backend, whose properties say what it can do.

Nothing outside of this module and `lmcot.frozen.open` asks which backend it is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from lmcot.config.addresses import (
    check_base_url,
    check_headers,
    check_no_secrets,
    check_variable_name,
)
from lmcot.config.base import Dtype, NonNegativeInt, PositiveFloat, PositiveInt, Settings
from lmcot.config.models import VllmSettings, public_source
from lmcot.config.prompts import PromptSettings

_CLIENTS_AT_ONCE = 32
"""Calls of different clients that one frozen LM takes at the same time, where that is harmless."""


class CacheSettings(Settings):
    """The cache of the frozen LM's replies, on the disk of each node."""

    enabled: bool = True
    """Whether the reply cache is on."""
    folder: str | None = None
    """Folder of the cache, on a local disk and never on a shared file system; unset:
    ``$LMCOT_CACHE``, else ``~/.cache/lmcot``."""
    max_gib: PositiveFloat = 2.0
    """Largest size of the cache in GiB; the least recently used replies are dropped first."""


class BudgetSettings(Settings):
    """What a run may spend on the frozen LM; replies from the cache cost nothing.

    The run stops with a checkpoint once a limit is passed, by no more than the work units in
    flight. Raise the limit and rerun the same command to resume.
    """

    max_requests: PositiveInt | None = None
    """Most requests to the frozen LM in the whole run, all stages together; unset: no limit."""
    max_tokens: PositiveInt | None = None
    """Most tokens that the frozen LM reads and writes in the whole run; unset: no limit."""


class FrozenSettings(Settings):
    """What every backend has: lengths of what the frozen LM writes, cache and budget.

    The properties from `local_source` on are what a backend can do; a new one overrides those
    that do not hold for it, or derives from `LocalFrozen`.
    """

    max_answer_tokens: PositiveInt = 24
    """Longest answer, in tokens."""
    max_rationale_tokens: PositiveInt = 128
    """Longest rationale that the frozen LM writes (the ``cot`` row and the ``frozen`` teacher)."""
    max_thinking_tokens: NonNegativeInt = 0
    """Tokens that every answer and rationale may take in addition, for hidden thinking. A model
    that thinks before it answers needs a few thousand; unused tokens cost nothing."""
    cache: CacheSettings = Field(default_factory=CacheSettings)
    """The cache of greedy and seeded replies, probabilities and scores."""
    budget: BudgetSettings = Field(default_factory=BudgetSettings)
    """Limits on what the run may spend."""

    @property
    def answer_limit(self) -> int:
        """Tokens of an answer and of the thinking before it."""
        return self.max_answer_tokens + self.max_thinking_tokens

    @property
    def rationale_limit(self) -> int:
        """Tokens of a rationale of the frozen LM's own and of the thinking before it."""
        return self.max_rationale_tokens + self.max_thinking_tokens

    @property
    def local_source(self) -> str | None:
        """Model source of the weights and the tokenizer, where the model runs in our processes.

        None: it runs elsewhere, so neither its size nor its window nor its tokenizer is known, and
        its actors wait rather than compute.
        """
        return None

    @property
    def known_parameters(self) -> int | None:
        """Number of parameters of a model that runs elsewhere, if the settings tell it."""
        return None

    @property
    def lacks_likelihoods(self) -> str:
        """The settings by which the backend gives no log-likelihoods of given texts.

        Empty: it gives them.
        """
        return ""

    @property
    def isolates_calls(self) -> bool:
        """Whether a call's results depend on the prompts of that call alone, to the bit.

        Then an actor takes one call at a time, and a call's replies are cached as a whole.
        """
        return False

    @property
    def calls_at_once(self) -> int:
        """How many calls of different clients one actor takes at the same time, in threads."""
        return 1 if self.isolates_calls else _CLIENTS_AT_ONCE

    def chat_of(self, prompts: PromptSettings) -> Literal["auto", "never"]:
        """Whether a model that runs here gets its prompts through its tokenizer's chat template."""
        return prompts.chat

    @property
    def request_limit(self) -> tuple[str, float] | None:
        """The setting that limits one request with all its retries, and its seconds.

        None: the backend has no limit of its own.
        """
        return None

    @property
    def public_name(self) -> str:
        """Names the model for a service's clients: no address, and no folder of the machine."""
        raise NotImplementedError

    @property
    def address(self) -> str | None:
        """The address of its endpoint, kept from a service's clients; None: it has none."""
        return None

    @property
    def probe_url(self) -> str | None:
        """A URL that answers while the endpoint is up, without a key; None: it is always there."""
        return None

    def for_service(self) -> Self:
        """The settings as a service uses them, where speed comes before repetition to the bit."""
        return self


class LocalFrozen(FrozenSettings):
    """What every backend has whose model runs here, in actors of its own."""

    backend: str
    source: str
    """Where the weights come from: the same forms as ``policy.source``."""
    dtype: Dtype = "auto"
    """Data type of the weights and the arithmetic."""
    chat: Literal["auto", "never"] | None = None
    """``prompts.chat`` for this model alone; unset: as that says. Some small chat models follow
    demonstrations in plain text only."""

    @property
    def local_source(self) -> str:
        """Model source of the weights and the tokenizer."""
        return self.source

    def chat_of(self, prompts: PromptSettings) -> Literal["auto", "never"]:
        """``chat``, else ``prompts.chat``."""
        return self.chat or prompts.chat

    @property
    def public_name(self) -> str:
        """The backend and the source; of a path or a URL its last part."""
        return f"{self.backend}:{public_source(self.source)}"


class TransformersFrozen(LocalFrozen):
    """The frozen LM runs here, in actors of its own, on transformers."""

    backend: Literal["transformers"]
    max_batch_tokens: PositiveInt = 8192
    """Most tokens in one pass of the model; a longer prompt takes several passes."""
    max_cached_tokens: PositiveInt = 32768
    """Most tokens whose keys and values are held at once, prompts and answers together; requests
    beyond that wait. A 7B model in bfloat16 takes 0.5 MiB per token."""
    batching: Literal["unit", "dynamic"] = "unit"
    """``unit``: each call goes through the model by itself, so a run repeats to the bit.
    ``dynamic``: requests of all clients are batched as they arrive, which is faster with several
    reward actors; results repeat up to rounding."""

    @property
    def isolates_calls(self) -> bool:
        """Whether each call goes through the model by itself."""
        return self.batching == "unit"

    def for_service(self) -> Self:
        """With dynamic batching: requests that come at once go through the model together."""
        return self.model_copy(update={"batching": "dynamic"})


class VllmFrozen(LocalFrozen, VllmSettings):
    """The frozen LM runs here, in actors of its own, on vLLM.

    Requests of all clients are batched as they arrive; results repeat up to rounding. An
    encoder-decoder is refused.
    """

    backend: Literal["vllm"]


RequestParameter = Literal["max_tokens", "temperature", "seed", "stop"]
"""Parameters of a request for a reply, besides the model and the prompt."""
DroppedParameter = Literal["temperature", "seed", "stop"]
"""Parameters that a request may omit; ``max_tokens`` is not one, since it ends the reply."""
_OWN_PARAMETERS = (
    *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "seed"),
    *("stop", "stream", "n", "echo", "logprobs", "top_logprobs"),
)


class OpenAIFrozen(FrozenSettings):
    """The frozen LM is behind an OpenAI-compatible HTTP endpoint: a true black box."""

    backend: Literal["openai"]
    base_url: Annotated[str, BeforeValidator(check_base_url)]
    """The endpoint's address, for example ``http://localhost:8000/v1``."""
    model: str
    """The model's name at that endpoint."""
    api_key_env: Annotated[str, BeforeValidator(check_variable_name)] = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; it is never written anywhere."""
    api: Literal["chat", "completions"] = "chat"
    """``chat``: the endpoint renders the prompts by its model's chat template. ``completions``:
    plain text for base models; where the endpoint echoes log-probabilities (vLLM does), it also
    gives the likelihoods that fluency and the likelihood gain are measured by."""
    concurrency: PositiveInt = 8
    """Most requests in flight, per frozen-LM actor."""
    requests_per_minute: PositiveFloat | None = None
    """Most requests per minute, per frozen-LM actor, spread evenly; unset: no limit."""
    tokens_per_minute: PositiveFloat | None = None
    """Most tokens read and written per minute, per frozen-LM actor; unset: no limit."""
    connect_timeout_s: PositiveFloat = 10.0
    """Time limit for a connection to the endpoint."""
    read_timeout_s: PositiveFloat = 60.0
    """Time limit of one reply."""
    total_timeout_s: PositiveFloat = 300.0
    """Time limit of one request with all its retries and pauses."""
    max_retries: NonNegativeInt = 6
    """How often a request that failed for a transient reason is retried, with growing pauses."""
    parameters: PositiveInt | None = None
    """Number of the model's parameters, if known, for the FLOP estimate in the report."""
    rename_parameters: dict[RequestParameter, str] = Field(default_factory=dict)
    """The endpoint's own names of parameters, for example ``{max_tokens: max_completion_tokens}``.
    Parameters that it refuses are learned at the start; this is for what cannot be learned."""
    drop_parameters: tuple[DroppedParameter, ...] = ()
    """Parameters that requests never send. Without ``temperature`` the endpoint's own applies, and
    replies to the same prompt differ; without ``seed`` the samples of a vote do not repeat; without
    ``stop`` the endpoint only writes more tokens, since replies are cut here too."""
    extra_body: Annotated[dict[str, Any], AfterValidator(check_no_secrets)] = Field(
        default_factory=dict
    )
    """Fields that are added to each request as they are, for example ``{reasoning_effort: low}`` or
    ``{chat_template_kwargs: {enable_thinking: false}}``."""
    headers: Annotated[dict[str, str], AfterValidator(check_headers)] = Field(default_factory=dict)
    """HTTP headers of each request. ``${NAME}`` stands for the environment variable NAME; a secret
    must be given so, as in ``{api-key: "${AZURE_KEY}"}``, and is never written anywhere."""
    query: Annotated[dict[str, str], AfterValidator(check_no_secrets)] = Field(default_factory=dict)
    """Query parameters of each request, for example ``{api-version: "2024-10-21"}``."""
    verify_tls: bool = True
    """Whether the certificate of an ``https`` endpoint is checked."""
    ca_file: str | None = None
    """File of the certificate authorities (PEM) that are trusted; unset: those of the system."""

    @field_validator("extra_body")
    @classmethod
    def _extra_body_adds(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in _OWN_PARAMETERS:
                raise ValueError(
                    f"extra_body holds '{name}', which lmcot sets itself: leave it out "
                    "(rename_parameters and drop_parameters change how it is sent)"
                )
        return value

    @property
    def known_parameters(self) -> int | None:
        """Number of parameters, if the settings tell it."""
        return self.parameters

    @property
    def lacks_likelihoods(self) -> str:
        """The chat API gives no log-likelihoods; whether a server of the other does is probed."""
        return "frozen.backend 'openai' with api 'chat'" if self.api == "chat" else ""

    @property
    def request_limit(self) -> tuple[str, float]:
        """The time limit of one request with all its retries and pauses."""
        return "frozen.total_timeout_s", self.total_timeout_s

    @property
    def public_name(self) -> str:
        """The backend and the model."""
        return f"openai:{self.model}"

    @property
    def address(self) -> str:
        """The endpoint's address."""
        return self.base_url

    @property
    def probe_url(self) -> str:
        """The list of models, which endpoints answer, be it with a refusal."""
        return f"{self.base_url.rstrip('/')}/models"


Frozen = Annotated[TransformersFrozen | VllmFrozen | OpenAIFrozen, Field(discriminator="backend")]
