"""The service as Ray Serve applications: the small LM, the frozen LM, and the ingress.

There are three applications of one deployment each, not one application of three: Serve removes an
application as a whole, and a request in flight in the ingress would lose the models. So the ingress
is removed first, once its requests are answered, and each part is updated and scaled by itself.

``lmcot.serve.app:small``, ``frozen`` and ``ingress`` are what ``serve run`` and ``serve deploy``
import; see deploy/serve.yaml.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from lmcot.actors.resources.cluster import nodes
from lmcot.actors.resources.plan import Roles
from lmcot.actors.resources.served import find_served_plan
from lmcot.answering.exchange import Draw, Query, Reply, Told
from lmcot.answering.pair import Pair, learned, open_pair
from lmcot.answering.schemas import Versions
from lmcot.config import Config, RoleSettings, ServedRole, ServeSettings
from lmcot.errors import UserError
from lmcot.records import Paragraph
from lmcot.serve.access import token_digests
from lmcot.serve.api import make_app
from lmcot.serve.deployments import FrozenLM, SmallLM
from lmcot.serve.service import NotReady, Service
from lmcot.storage import place


class Arguments(BaseModel):
    """Arguments of an application in a Serve config file."""

    model_config = ConfigDict(extra="forbid")
    run_dir: str
    """The run whose policy and settings are served."""
    policy: str | None = None
    """``refined``, ``distilled``, ``best`` or ``base``; unset: the most trained one."""
    overrides: list[str] = []
    """``key.sub=value``, as on the command line."""

    def pair(self) -> Pair:
        """The trained pair."""
        return learned(open_pair(place(self.run_dir), self.policy, self.overrides))


class IngressArguments(Arguments):
    """Arguments of the ingress."""

    # A token that is put here by mistake must not be shown.
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)
    token_digests: list[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = []
    """SHA-256 digests of the accepted bearer tokens. If empty, the tokens in the environment of the
    process that builds the application are used; that is a process of the cluster."""
    anyone: bool = False
    """Whether the service may run without authentication."""


# Serve would parse these by the builders' annotations, but not where annotations are strings, as
# they all are here.


def small(arguments: dict[str, Any]) -> Application:
    """The small LM of a run directory."""
    return _application(Arguments.model_validate(arguments), 0)


def frozen(arguments: dict[str, Any]) -> Application:
    """The frozen LM of a run directory's settings."""
    return _application(Arguments.model_validate(arguments), 1)


def ingress(arguments: dict[str, Any]) -> Application:
    """The ingress, with a run directory's settings.

    Raises:
        UserError: if no tokens are given and ``anyone`` is not set.
    """
    given = IngressArguments.model_validate(arguments)
    digests = tuple(given.token_digests) or token_digests(given.pair().config.serve)
    if not digests and not given.anyone:
        raise UserError(
            "nothing says who may send requests: give the ingress's args `token_digests` (SHA-256, "
            "as `printf %s TOKEN | sha256sum` prints it), or `anyone: true`"
        )
    return _application(given, 2, digests)


def _application(arguments: Arguments, number: int, digests: Sequence[str] = ()) -> Application:
    pair = arguments.pair()
    # Each of the three is built by itself: free resources change in between, the nodes do not.
    roles = find_served_plan(pair.config, nodes()).roles
    return applications(pair, roles, digests)[number][1]


def applications(
    pair: Pair, roles: Roles, digests: Sequence[str] = ()
) -> list[tuple[str, Application]]:
    """The applications of a trained pair by their names, in the order to start them in.

    Args:
        roles: resources of one replica of each.
        digests: digests of the accepted tokens.
    """
    config, settings = pair.config, pair.config.serve
    small_name, frozen_name, name = names(settings)
    writer = _deployment(SmallLM, settings.small, roles["small"], config).bind(
        config, pair.source, pair.version, settings.small.threads
    )
    answerer = _deployment(FrozenLM, settings.frozen, roles["frozen"], config).bind(
        config, settings.frozen.threads
    )
    door = _deployment(serve.ingress()(Ingress), settings.ingress, roles["ingress"], config)
    return [
        (small_name, writer),
        (frozen_name, answerer),
        (name, door.options(name="Ingress").bind(config, digests)),
    ]


def names(settings: ServeSettings) -> tuple[str, str, str]:
    """Names of the applications, in the order to start them in."""
    return f"{settings.name}-small", f"{settings.name}-frozen", settings.name


def _deployment(what: Any, role: ServedRole, takes: RoleSettings, config: Config) -> Any:
    """A class as a deployment with the settings of its role."""
    settings = config.serve
    # The ingress has bounds of its own and says when to retry; Serve's bound lies above them.
    options: dict[str, Any] = {
        "max_ongoing_requests": 4 * settings.max_requests + 2 * settings.limits.readers,
        "graceful_shutdown_timeout_s": settings.shutdown_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 5,
        "ray_actor_options": {
            "num_cpus": takes.cpus, "num_gpus": takes.gpus, "resources": takes.resources,
        },
    }  # fmt: skip
    if role.max_replicas is None:
        options["num_replicas"] = role.replicas
    else:
        options["autoscaling_config"] = {
            "min_replicas": role.replicas,
            "max_replicas": role.max_replicas,
            "target_ongoing_requests": role.target_requests,
        }
    return serve.deployment(name=what.__name__, **options)(what)


class Ingress:
    """Takes requests, and combines both models' work."""

    def __init__(self, config: Config, digests: Sequence[str] = ()) -> None:
        """Args: digests: digests of the accepted tokens."""
        small_name, frozen_name, _ = names(config.serve)
        self._digests = tuple(digests)
        log = logging.getLogger("lmcot.serve")
        if not log.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(message)s"))
            log.addHandler(handler)
            log.setLevel(logging.INFO)
            log.propagate = False
        self._small = _RemoteSmall(serve.get_deployment_handle("SmallLM", small_name))
        self._frozen = _RemoteFrozen(serve.get_deployment_handle("FrozenLM", frozen_name))
        self._service = Service(config, self._small, self._frozen, self._ready)

    async def digests(self) -> tuple[str, ...]:
        """Digests of the accepted tokens."""
        return self._digests

    async def end(self) -> int:
        """Refuses new requests from now on; returns how many are in flight."""
        self._service.intake.ending = True
        return self._service.intake.at_work

    async def _ready(self) -> Versions:
        small = await self._small.version()
        if not await self._frozen.there():
            raise NotReady("the frozen LM's endpoint does not answer")
        return Versions(small=small, frozen=await self._frozen.identity())

    def __serve_build_asgi_app__(self) -> Any:
        """Makes the application in the replica, whose handles it uses; the proxy tells ids."""
        return make_app(self._service, self._digests, tells_id=False)


class _RemoteSmall:
    """The small LM's deployment as a `Writer`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def version(self) -> str:
        return str(await self._handle.version.remote())

    async def fit_context(
        self, question: str, context: Sequence[Paragraph]
    ) -> tuple[Paragraph, ...]:
        return tuple(await self._handle.fit_context.remote(question, context))

    async def write(
        self, question: str, context: Sequence[Paragraph], draw: Draw, first_answer: str = ""
    ) -> AsyncGenerator[Told, None]:
        stream = self._handle.options(stream=True).write
        told = stream.remote(question, context, draw, first_answer)
        done = False
        try:
            async for one in told:
                yield one
            done = True
        finally:
            if not done:
                told.cancel()


class _RemoteFrozen:
    """The frozen LM's deployment as an `Answerer`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def identity(self) -> str:
        return str(await self._handle.identity.remote())

    async def there(self) -> bool:
        return bool(await self._handle.there.remote())

    async def answer(self, query: Query) -> Reply:
        return await self._reply(self._handle.answer.remote(query))

    async def answer_first(self, query: Query) -> Reply:
        return await self._reply(self._handle.answer_first.remote(query))

    async def write_object(self, query: Query, answer: str, schema: str) -> Reply:
        return await self._reply(self._handle.write_object.remote(query, answer, schema))

    async def _reply(self, response: Any) -> Reply:
        try:
            reply: Reply = await response
        except BaseException:
            response.cancel()
            raise
        return reply
