"""Settings of the HTTP service."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from lmcot.config.base import NonNegativeFloat, PositiveFloat, PositiveInt, Settings
from lmcot.config.models import VllmSettings
from lmcot.config.runtime import check_amounts

_PREFIX = re.compile(r"/|(/[A-Za-z0-9._-]+)+")


class ServedRole(Settings):
    """The replicas of one part of the service, and what each of them reserves."""

    replicas: PositiveInt = 1
    """Initial and smallest number of replicas."""
    max_replicas: PositiveInt | None = None
    """Largest number of replicas under load (Ray Serve's autoscaling); unset: ``replicas``."""
    target_requests: PositiveFloat = 8.0
    """Average number of requests in flight per replica that autoscaling aims at."""
    cpus: NonNegativeFloat | None = None
    """Ray CPUs reserved for one replica; unset: 1 where a model computes and 0.1 elsewhere, or less
    if the cluster has less room."""
    gpus: NonNegativeFloat = 0.0
    """Ray GPUs reserved for one replica."""
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Custom Ray resources reserved for one replica."""
    threads: PositiveInt = 1
    """CPU threads that one replica computes with."""

    @model_validator(mode="after")
    def _amounts_that_ray_grants(self) -> ServedRole:
        amounts = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        takes = {name: amount for name, amount in amounts.items() if amount}
        check_amounts(self.gpus, self.resources, takes)
        return self

    @model_validator(mode="after")
    def _bounds_in_order(self) -> ServedRole:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, less than replicas ({self.replicas}): raise "
                "it, or leave it unset"
            )
        return self


class ServedSmall(ServedRole):
    """The replicas of the small LM, and the engine that each of them writes with."""

    vllm: VllmSettings | None = None
    """Write with vLLM, which must be installed wherever the replicas run; unset: lmcot's own
    engine."""


class Limits(Settings):
    """Limits of a request; a request beyond them is refused before anything computes."""

    body_bytes: PositiveInt = 2**20
    """Size of a request's body."""
    json_values: PositiveInt = 20_000
    """Values in a request's JSON."""
    body_s: PositiveFloat = 10.0
    """Seconds that a request's body may take to arrive."""
    readers: PositiveInt = 256
    """Bodies that one ingress replica waits for at once; if more come, the one that it has waited
    for longest gets 408."""
    question_chars: PositiveInt = 2000
    """Length of a question."""
    context_chars: PositiveInt = 200_000
    """Length of a context, titles and texts together. The models read what fits into
    ``data.context.max_tokens``."""
    passages: PositiveInt = 200
    """Passages in a context."""
    samples: PositiveInt = 16
    """Rationales for one answer."""
    batch: PositiveInt = 32
    """Questions in one request."""
    instruction_chars: PositiveInt = 20_000
    """Length of the instructions to the frozen LM: the system messages of OpenAI's clients."""
    object_tokens: PositiveInt = 256
    """Length of an answer that the frozen LM has to write as a JSON object."""
    new_tokens: PositiveInt | None = None
    """Length of a rationale; unset: twice ``policy.max_new_tokens``."""


class ServeSettings(Settings):
    """The trained pair behind an HTTP endpoint, on Ray Serve."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of the machine's."""
    port: PositiveInt = 8000
    """Port to listen on."""
    prefix: str = "/"
    """Path prefix of the service: ``/guided`` makes ``/guided/v1/answer``. On a cluster that serves
    other applications each needs its own."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that requests may be sent to (their Host header); ``*.example.org`` for all below
    one, ``*`` for any. Unset: any, but only localhost and addresses if no token is required and
    ``host`` is a loopback address: otherwise a page of any site could send requests from its
    visitors' browsers."""
    name: str = "lmcot"
    """Name of the application in Ray Serve, and of the model for OpenAI's clients."""
    small: ServedSmall = ServedSmall()
    """Replicas of the small LM."""
    frozen: ServedRole = ServedRole()
    """Replicas of the frozen LM, or of the client of its endpoint."""
    ingress: ServedRole = ServedRole()
    """Replicas that accept requests."""
    limits: Limits = Limits()
    """Limits of a request."""
    deadline_s: PositiveFloat = 60.0
    """Longest time that a request may take, from its first byte; its work is cancelled then."""
    max_requests: PositiveInt = 64
    """Requests in flight per ingress replica; further ones get 503 and a time to retry after."""
    tokens_env: str = "LMCOT_SERVE_TOKENS"
    """Environment variable of ``lmcot serve`` with comma-separated bearer tokens; the replicas get
    their digests. If it is unset or empty, no token is required."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may send requests; none by default."""
    log_contents: bool = False
    """Whether questions and answers are logged."""
    start_timeout_s: PositiveFloat = 600.0
    """Time limit for all replicas to start and load their models."""
    shutdown_s: PositiveFloat = 30.0
    """Grace period for requests in flight at shutdown."""

    @field_validator("prefix")
    @classmethod
    def _path(cls, prefix: str) -> str:
        if not _PREFIX.fullmatch(prefix):
            raise ValueError(
                f"'{prefix}' is not a path to serve under: it begins with '/', ends without, and "
                "has letters, digits, '.', '_' and '-' between slashes"
            )
        return prefix
