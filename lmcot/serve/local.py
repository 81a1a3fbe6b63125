"""The trained pair in a program or a notebook, without a server."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

from lmcot.actors.base import prepare_process
from lmcot.serve.asking import Context, open_pair, paragraphs
from lmcot.serve.deployments import Draw, FrozenLM, SmallLM, new_seed
from lmcot.serve.guidance import Ask, Refused, guide
from lmcot.serve.schemas import AnswerResponse
from lmcot.storage import place

if TYPE_CHECKING:
    from lmcot.storage import Place

__all__ = ["Guide", "Refused"]


class Guide:
    """Both models in this process."""

    def __init__(
        self, run_dir: str | Place, *, policy: str | None = None, threads: int | None = None
    ) -> None:
        """Loads them.

        Args:
            policy: ``refined``, ``distilled``, ``best`` or ``base``; unset: the most trained one.
            threads: CPU threads; unset: as the process has them.

        Raises:
            UserError: if that is no run directory with a trained pair.
        """
        pair = open_pair(place(run_dir), policy)
        if threads is not None:
            prepare_process(threads)
        self._config = pair.config
        self._small = SmallLM(pair.config, pair.source, pair.version)
        self._frozen = FrozenLM(pair.config)

    def answer(
        self,
        question: str,
        context: Context = "",
        *,
        samples: int = 1,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        unguided: bool = False,
    ) -> AnswerResponse:
        """A guided answer; with several samples the vote over theirs.

        Args:
            temperature: unset: greedy for one sample, ``evaluate.temperature`` for several.
            unguided: whether the frozen LM is asked without guidance, too.

        Raises:
            Refused: if the models cannot answer that.
        """
        config = self._config
        if temperature is None:
            temperature = config.evaluate.temperature if samples > 1 else 0.0
        draw = Draw(
            samples,
            max_tokens or config.policy.max_new_tokens,
            temperature,
            new_seed() if seed is None else seed,
            tokens=False,
            deadline=config.serve.deadline_s,
        )
        passages = [(one.title, " ".join(one.sentences)) for one in paragraphs(context)]
        ask = Ask(uuid.uuid4().hex, question, passages, draw, unguided)
        return asyncio.run(self._answer(ask))

    async def _answer(self, ask: Ask) -> AnswerResponse:
        found = None
        async for one in guide(ask, self._small, self._frozen):
            found = one
        if not isinstance(found, AnswerResponse):
            raise RuntimeError("there was no answer")
        return found
