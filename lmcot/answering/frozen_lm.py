"""The frozen LM: it answers, with a rationale or without one."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from lmcot.answering.asking import Asking
from lmcot.answering.exchange import Query, Reply
from lmcot.answering.presence import Presence, without_address
from lmcot.config import Config
from lmcot.data.tasks import EXTRACTIVE_QA, Task, open_task
from lmcot.records import Answer, Completion, Example, Failure, Missing

_log = logging.getLogger("lmcot.answering")


class FrozenLM:
    """Answers; a local model batches concurrent requests, an endpoint's client paces itself."""

    def __init__(self, config: Config) -> None:
        """Loads the model, or opens the endpoint's client."""
        from lmcot.frozen.open import open_frozen_lm
        from lmcot.models.sources import load_tokenizer

        if config.frozen is None:
            raise ValueError("the settings have no frozen LM")
        settings = config.frozen.for_service()
        self._settings, self._name = settings, settings.public_name
        self._presence = Presence(settings)
        self._task = open_task(config.task)
        self._lm = open_frozen_lm(settings, config.prompts)
        self._calls = ThreadPoolExecutor(settings.calls_at_once)
        # The special tokens of an endpoint's model are not known here.
        reads = settings.local_source or config.policy.source
        self._asking = Asking(config, load_tokenizer(reads))

    def identity(self) -> str:
        """The model's name for clients."""
        return self._name

    async def there(self) -> bool:
        """Whether the model can answer now."""
        return await self._presence.there()

    async def answer(self, query: Query) -> Reply:
        """The answer to a question, guided by a rationale or without one."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._calls, self._answer, query)

    async def answer_first(self, query: Query) -> Reply:
        """The first answer to a question, which the small LM advises on."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._calls, self._answer_first, query)

    async def write_object(self, query: Query, answer: str, schema: str) -> Reply:
        """The answer as a JSON object of a schema: the text as the model writes it, unchecked."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._calls, self._write_object, query, answer, schema)

    def check_alive(self) -> None:
        """Checks that a local model can be asked.

        Raises:
            RuntimeError: if its engine has ended.
        """
        self._lm.check_alive()

    def close(self) -> None:
        """Drops the requests that wait for the model; it cannot be asked again."""
        self._calls.shutdown(wait=False, cancel_futures=True)
        self._lm.close()

    def _answer(self, query: Query) -> Reply:
        wish = query.wish
        prompt = self._asking.answer_prompt(_example(query), query.rationale, wish.instruction)
        sampling = self._asking.answer_sampling(guided=query.rationale is not None)
        (found,) = self._lm.generate([prompt], sampling)
        if isinstance(found, Failure):
            return self._failed(found)
        reply = read_reply(found, self._name, self._task, query.question)
        if wish.max_tokens is None:
            return reply
        said = reply.answer
        short = self._asking.shortened(said.extracted, wish.max_tokens)
        missing: Missing = said.missing if short == said.extracted else "cut"
        return replace(reply, answer=replace(said, extracted=short, missing=missing))

    def _answer_first(self, query: Query) -> Reply:
        prompt = self._asking.first_prompt(_example(query))
        (found,) = self._lm.generate([prompt], self._asking.first_sampling())
        if isinstance(found, Failure):
            return self._failed(found)
        return read_reply(found, self._name, self._task, query.question)

    def _write_object(self, query: Query, answer: str, schema: str) -> Reply:
        wish = query.wish
        prompt = self._asking.object_prompt(
            _example(query), query.rationale or "", answer, schema, wish.instruction
        )
        (found,) = self._lm.generate([prompt], self._asking.object_sampling(wish.max_tokens))
        if isinstance(found, Failure):
            return self._failed(found)
        missing: Missing = "cut" if found.finish_reason == "length" else ""
        said = Answer(found.text, "", found.tokens_in, found.tokens_out, missing)
        return Reply(said, version=self._name)

    def _failed(self, failure: Failure) -> Reply:
        _log.warning("the frozen LM failed: %s", failure.reason)
        return Reply(failure=without_address(failure.reason, self._settings), version=self._name)


def _example(query: Query) -> Example:
    return Example(
        "asked", query.question.strip(), "", query.paragraphs, first_answer=query.first_answer
    )


def read_reply(
    found: Completion, version: str, task: Task = EXTRACTIVE_QA, question: str = ""
) -> Reply:
    """A completion with the answer that is read out of it."""
    said = task.answer(found, question)
    if said.silent:
        return Reply(failure=said.silent, version=version)
    return Reply(said, version=version)
