"""The service as Ray Serve applications: the small LM, the frozen LM, and what takes requests in.

Three applications of one deployment each, not one of three: an application is taken down as a
whole, and a request that is under way in the ingress would find nobody to answer it. So the ingress
goes first, when all that it has is answered, and each part is updated and scaled by itself.

``lmcot.serve.app:small``, ``frozen`` and ``ingress`` are what ``serve run`` and ``serve deploy``
import; see deploy/serve.yaml.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from lmcot.config import Config, ServedRole
from lmcot.errors import UserError
from lmcot.records import Paragraph
from lmcot.serve.api import NotReady, Service, make_app
from lmcot.serve.asking import Pair, open_pair
from lmcot.serve.deployments import Draw, FrozenLM, Passages, Reply, SmallLM, Told, Wish
from lmcot.serve.schemas import Versions
from lmcot.storage import place


class Arguments(BaseModel):
    """What an application takes from a Serve config file."""

    model_config = ConfigDict(extra="forbid")
    run_dir: str
    """The run whose policy and settings are served."""
    policy: str | None = None
    """``refined``, ``distilled``, ``best`` or ``base``; unset: the most trained one."""
    overrides: list[str] = []
    """``key.sub=value``, as on the command line."""

    def pair(self) -> Pair:
        """The trained pair."""
        return open_pair(place(self.run_dir), self.policy, self.overrides)


def _pair(arguments: dict[str, Any]) -> Pair:
    # Serve would make them of the annotation, but not of one that is a string, as all are here.
    return Arguments.model_validate(arguments).pair()


def small(arguments: dict[str, Any]) -> Application:
    """The small LM of a run directory."""
    return applications(_pair(arguments))[0][1]


def frozen(arguments: dict[str, Any]) -> Application:
    """The frozen LM of a run directory's settings."""
    return applications(_pair(arguments))[1][1]


def ingress(arguments: dict[str, Any]) -> Application:
    """What takes requests in, with a run directory's settings."""
    return applications(_pair(arguments))[2][1]


def applications(pair: Pair) -> list[tuple[str, Application]]:
    """The applications of a trained pair by their names, in the order to start them in."""
    config, settings = pair.config, pair.config.serve
    writer = _deployment(SmallLM, settings.small, config).bind(
        config, pair.source, pair.version, settings.small.threads
    )
    answerer = _deployment(FrozenLM, settings.frozen, config).bind(config, settings.frozen.threads)
    door = _deployment(serve.ingress()(Ingress), settings.ingress, config, name="Ingress")
    return [
        (f"{settings.name}-small", writer),
        (f"{settings.name}-frozen", answerer),
        (settings.name, door.bind(config)),
    ]


def _deployment(what: Any, role: ServedRole, config: Config, name: str | None = None) -> Any:
    """A class as a deployment with the settings of its role."""
    settings = config.serve
    # The bound is the ingress's own, which says when to come again; Serve's lies above it.
    options: dict[str, Any] = {
        "max_ongoing_requests": 4 * settings.max_requests,
        "graceful_shutdown_timeout_s": settings.shutdown_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 5,
        "ray_actor_options": {
            "num_cpus": role.cpus, "num_gpus": role.gpus, "resources": role.resources,
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
    return serve.deployment(name=name or what.__name__, **options)(what)


class Ingress:
    """Takes requests in, and puts both models' parts together."""

    def __init__(self, config: Config, digests: Sequence[str] = ()) -> None:
        """Args: digests: of the tokens that are asked for."""
        name = config.serve.name
        self._digests = tuple(digests)
        log = logging.getLogger("lmcot.serve")
        if not log.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(message)s"))
            log.addHandler(handler)
            log.setLevel(logging.INFO)
            log.propagate = False
        self._small = _RemoteSmall(serve.get_deployment_handle("SmallLM", f"{name}-small"))
        self._frozen = _RemoteFrozen(serve.get_deployment_handle("FrozenLM", f"{name}-frozen"))
        self._service = Service(config, self._small, self._frozen, self._ready)

    async def digests(self) -> tuple[str, ...]:
        """Of the tokens that are asked for."""
        return self._digests

    async def end(self) -> int:
        """Takes no more requests in; tells how many are at work still."""
        self._service.intake.ending = True
        return self._service.intake.at_work

    async def _ready(self) -> Versions:
        small = await self._small.version()
        if not await self._frozen.there():
            raise NotReady("the frozen LM's endpoint does not answer")
        return Versions(small=small, frozen=await self._frozen.identity())

    def __serve_build_asgi_app__(self) -> Any:
        """Made in the replica: it holds the deployments' handles. Serve's proxy tells the ids."""
        return make_app(self._service, self._digests, tells_id=False)


class _RemoteSmall:
    """The small LM's deployment as a `Writer`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def version(self) -> str:
        return str(await self._handle.version.remote())

    async def write(self, question: str, context: Passages, draw: Draw) -> AsyncIterator[Told]:
        told = self._handle.options(stream=True).write.remote(question, context, draw)
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

    async def answer(
        self,
        question: str,
        paragraphs: Sequence[Paragraph],
        rationale: str | None,
        wish: Wish | None = None,
    ) -> Reply:
        return await self._reply(self._handle.answer.remote(question, paragraphs, rationale, wish))

    async def write_object(
        self,
        question: str,
        paragraphs: Sequence[Paragraph],
        rationale: str,
        answer: str,
        schema: str,
        wish: Wish,
    ) -> Reply:
        return await self._reply(
            self._handle.write_object.remote(question, paragraphs, rationale, answer, schema, wish)
        )

    async def _reply(self, response: Any) -> Reply:
        try:
            reply: Reply = await response
        except BaseException:
            response.cancel()
            raise
        return reply


def check_port(host: str, port: int) -> None:
    """Whether the service may listen there.

    Raises:
        UserError: if something else does.
    """
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            raise UserError(
                f"the service cannot listen at {host}:{port} ({error.strerror}): set serve.port "
                "to another, or end what listens there"
            ) from None
