"""Settings of the HTTP service."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from lmcot.config.base import NonNegativeFloat, PositiveFloat, PositiveInt, Settings
from lmcot.config.runtime import check_amounts

_PREFIX = re.compile(r"/|(/[A-Za-z0-9._-]+)+")


class ServedRole(Settings):
    """The replicas of one part of the service, and what one of them takes."""

    replicas: PositiveInt = 1
    """Replicas at the start, and the least there are."""
    max_replicas: PositiveInt | None = None
    """Up to so many under load (Ray Serve's autoscaling); unset: never more."""
    target_requests: PositiveFloat = 8.0
    """Requests at work on a replica on average that autoscaling aims at."""
    cpus: NonNegativeFloat | None = None
    """Ray CPUs reserved for one replica; unset: 1 where a model computes and 0.1 elsewhere, or as
    much less as the cluster has room for."""
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


class Limits(Settings):
    """What a request may ask for; what is beyond is refused before anything computes."""

    body_bytes: PositiveInt = 2**20
    """Of a request's body."""
    json_depth: PositiveInt = 16
    """Nesting of a request's JSON."""
    json_values: PositiveInt = 20_000
    """Values in a request's JSON."""
    body_s: PositiveFloat = 10.0
    """Seconds that a request's body may take to arrive."""
    readers: PositiveInt = 256
    """Bodies that one ingress replica waits for at once; where more come, the one that has been
    waited for longest gets 408."""
    question_chars: PositiveInt = 2000
    """Of a question."""
    context_chars: PositiveInt = 200_000
    """Of a context, titles and texts together. The models read what fits into
    ``data.context.max_tokens``."""
    passages: PositiveInt = 200
    """Of a context."""
    samples: PositiveInt = 16
    """Rationales for one answer."""
    batch: PositiveInt = 32
    """Questions in one request."""
    instruction_chars: PositiveInt = 20_000
    """Of the instructions to the frozen LM: the system messages of OpenAI's clients."""
    object_tokens: PositiveInt = 256
    """Of an answer that the frozen LM has to write as a JSON object."""
    new_tokens: PositiveInt | None = None
    """Of a rationale; unset: twice ``policy.max_new_tokens``."""


class ServeSettings(Settings):
    """The trained pair behind an HTTP endpoint, on Ray Serve."""

    host: str = "127.0.0.1"
    """Address that it listens at; 0.0.0.0 for all of the machine's."""
    port: PositiveInt = 8000
    """Its port."""
    prefix: str = "/"
    """Path that it is reached under: ``/guided`` makes ``/guided/v1/answer``. On a cluster that
    serves other applications each needs its own."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that requests may be sent to (their Host header); ``*.example.org`` for all below one,
    ``*`` for any. Unset: any, but where no token is asked for and ``host`` is a loopback address
    only localhost and addresses, or a page of any site could ask in its visitors' browsers."""
    name: str = "lmcot"
    """Of the application in Ray Serve, and of the model for OpenAI's clients."""
    small: ServedRole = ServedRole()
    """Replicas of the small LM."""
    frozen: ServedRole = ServedRole()
    """Replicas of the frozen LM, or of the client of its endpoint."""
    ingress: ServedRole = ServedRole()
    """Replicas of what takes requests in."""
    limits: Limits = Limits()
    """What a request may ask for."""
    deadline_s: PositiveFloat = 60.0
    """Longest a request may take, from its first byte; what it has at work is cancelled then."""
    max_requests: PositiveInt = 64
    """Requests that one ingress replica takes at once; more get 503 and when to come again."""
    tokens_env: str = "LMCOT_SERVE_TOKENS"
    """Environment variable of ``lmcot serve`` with bearer tokens, separated by commas; the replicas
    get their digests. Unset or empty: none are asked for."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may ask; none by default."""
    log_contents: bool = False
    """Whether questions and answers stand in the log."""
    start_timeout_s: PositiveFloat = 600.0
    """Time limit for all replicas to start and load their models."""
    shutdown_s: PositiveFloat = 30.0
    """What is at work has so long to end when the service does."""

    @field_validator("prefix")
    @classmethod
    def _path(cls, prefix: str) -> str:
        if not _PREFIX.fullmatch(prefix):
            raise ValueError(
                f"'{prefix}' is no path to serve under: it begins with '/', ends without, and has "
                "letters, digits, '.', '_' and '-' between slashes"
            )
        return prefix
