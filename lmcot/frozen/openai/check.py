"""The first requests to an endpoint: they ask what the run will ask, and learn what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmcot.config import OpenAIFrozen
from lmcot.errors import UserError
from lmcot.frozen.needs import Found, Measure, Needs
from lmcot.frozen.openai.backend import REFUSED, OpenAILM
from lmcot.frozen.openai.choices import has_alternatives, to_choice
from lmcot.frozen.openai.errors import EndpointError, complaint
from lmcot.frozen.openai.form import complains_of_length
from lmcot.frozen.openai.probes import wrong_scores
from lmcot.frozen.openai.replies import Reply
from lmcot.records import Choice, Failure, FailureKind, Message, Prompt, Sampling, Usage
from lmcot.text.visible import visible_reply

_FIRST_RETRIES = 2
"""Retries of the very first request, so that an endpoint that is down is reported soon."""
_MAY_NAME = (400, 404, 422, 500, 501)
"""Statuses with which some endpoints refuse a parameter."""
_YES_NO = ("yes", "no")
_SAMPLES_FROM = 0.3
"""Temperature from which on the replies to an open question must differ."""
_STORY: Prompt = (
    Message("user", "Write the first two sentences of a story that nobody has told before."),
)
_STORY_TOKENS = (24, 48)
_STORIES = 5
"""How often the story is asked for, as long as the replies are equal: a model that samples does not
write so many equal tokens five times."""


def check_endpoint(
    settings: OpenAIFrozen, needs: Needs, spend: Callable[[Usage], None] = lambda usage: None
) -> Found:
    """Asks an endpoint one request of each form that the run will send.

    Parameters that it refuses are renamed or left out where that is possible.

    Args:
        spend: takes each request into account; what it raises ends the check.

    Raises:
        UserError: if it does not answer; names the setting to correct.
    """
    lm = OpenAILM(settings)
    try:
        return _Check(lm, settings, spend).run(needs)
    finally:
        lm.close()


class _Check:
    def __init__(
        self, lm: OpenAILM, settings: OpenAIFrozen, spend: Callable[[Usage], None]
    ) -> None:
        self._lm = lm
        self._settings = settings
        self._spend = spend
        self._answered = False
        self._notices: list[str] = []
        self._usage = Usage()
        lm.client.spend = self._count

    def run(self, needs: Needs) -> Found:
        before = self._lm.client.form
        for prompt, sampling in needs.completions:
            reply = self._learn(self._lm.completion_body(prompt, sampling))
            self._look_at(reply, sampling.max_new_tokens)
        notices = [f"frozen: {one}" for one in self._lm.client.form.notices(before)]
        lacks: dict[Measure, str] = {}
        if needs.choices and (reason := self._no_choice(needs.choices)):
            lacks["choose"] = reason
        if needs.scores and (reason := self._no_scores()):
            lacks["score"] = reason
        if alike := self._greedy([sampling for _, sampling in needs.completions]):
            self._notices.append(alike)
        learned = self._lm.client.form.into(self._settings)
        told = tuple(dict.fromkeys([*notices, *self._notices]))
        return Found(learned, told, lacks, self._usage)

    def _count(self, usage: Usage) -> None:
        self._usage += usage
        self._spend(usage)

    def _learn(self, body: dict[str, Any]) -> Reply:
        """The reply to a request, in the first form that the endpoint takes.

        Raises:
            UserError: if it takes none.
        """
        client = self._lm.client
        while True:
            try:
                return self._ask(body)
            except EndpointError as error:
                if error.status not in _MAY_NAME or complains_of_length(error.said):
                    raise UserError(complaint(error, self._settings)) from None
                form = client.form.next_by_name(body, error.said)
                if form is None:
                    return self._try_others(body, error)
                client.form = form

    def _try_others(self, body: dict[str, Any], error: EndpointError) -> Reply:
        """Tries the other forms after a refusal that names no parameter."""
        client, before = self._lm.client, self._lm.client.form
        if error.status in (*REFUSED, 500) and self._settings.model not in error.said:
            for form in before.others(body):
                client.form = form
                try:
                    reply = self._ask(body)
                except EndpointError:
                    continue
                # A limit under a name that the endpoint does not know is no limit.
                if reply.estimated or reply.tokens_out <= body["max_tokens"]:
                    return reply
            client.form = before
        raise UserError(complaint(error, self._settings))

    def _ask(self, body: dict[str, Any]) -> Reply:
        client, settings = self._lm.client, self._settings
        first = min(_FIRST_RETRIES, settings.max_retries)
        retries = settings.max_retries if self._answered else first
        reply = client.run(client.ask(body, lambda reply: reply, max_retries=retries))
        self._answered = True
        return reply

    def _look_at(self, reply: Reply, limit: int) -> None:
        endpoint = f"the endpoint {self._settings.base_url}"
        seen = visible_reply(reply.text)
        if (reply.thinking or seen.thinking) and not seen.text.strip():
            cut = f", cut at {limit} tokens" if reply.cut else ""
            self._notices.append(
                f"frozen: {endpoint} answers a first question with hidden thinking and no text"
                f"{cut}: raise frozen.max_thinking_tokens "
                f"({self._settings.max_thinking_tokens}), or switch thinking off with "
                "frozen.extra_body"
            )
        elif reply.withheld:
            self._notices.append(f"frozen: to a first question, {reply.withheld}")
        elif not reply.text.strip():
            self._notices.append(f"frozen: {endpoint} answers a first question without any text")
        if reply.estimated:
            self._notices.append(
                "frozen: the endpoint does not count tokens (usage): they are estimated by length, "
                "in budgets and reports too"
            )

    def _no_choice(self, prompts: tuple[Prompt, ...]) -> str:
        """Why the endpoint cannot say yes or no; empty if it can."""
        reason = ""
        for prompt in prompts:
            try:
                found, numbers = self._lm.client.run(self._lm.ask_choice(prompt, _read_choice))
            except EndpointError as error:
                found, numbers = self._failure(error), False
            if isinstance(found, Choice):
                if not numbers:
                    self._notices.append(
                        "frozen: the endpoint gives no log-probabilities, so the judge's yes or no "
                        "is read from the text and is 1 or 0: a coarse measure"
                    )
                return ""
            reason = found.reason
        return reason

    def _no_scores(self) -> str:
        """Why the endpoint's log-likelihoods of given texts cannot be used; empty if they can."""
        try:
            return wrong_scores(self._lm)
        except EndpointError as error:
            return self._failure(error).reason

    def _greedy(self, samplings: Sequence[Sampling]) -> str:
        """A notice about an endpoint that ignores the temperature; empty if it samples.

        Some servers take a temperature and ignore it; nothing in a reply shows it.
        """
        sampled = [one for one in samplings if one.temperature >= _SAMPLES_FROM]
        if not sampled:
            return ""
        temperature = max(one.temperature for one in sampled)
        shortest, longest = (one + self._settings.max_thinking_tokens for one in _STORY_TOKENS)
        # No longer than what the run asks for: a slow endpoint must have the time.
        room = max(shortest, min(longest, max(one.max_new_tokens for one in sampled)))
        replies = set()
        for seed in range(_STORIES):
            sampling = Sampling(room, temperature, seed=seed, stop=())
            try:
                reply = self._ask(self._lm.completion_body(_STORY, sampling))
            except EndpointError as error:
                reason = error.failure.reason  # the run can do without this
                return f"frozen: whether the endpoint samples could not be found out ({reason})"
            replies.add((reply.thinking, reply.text))
            if len(replies) > 1 or not (reply.thinking + reply.text).strip():
                return ""
        return (
            f"frozen: the endpoint gave the same reply {_STORIES} times to an open question, at "
            f"temperature {temperature:g} and with {_STORIES} seeds: it seems to ignore the "
            "temperature, so that all votes of a row in which the frozen LM is sampled "
            "(standard+sc, cot+sc) would be alike. Have the server sample (transformers serve does "
            "if the model's generation_config.json says do_sample: true), or take these rows out "
            "of evaluate.rows"
        )

    def _failure(self, error: EndpointError) -> Failure:
        if error.failure.kind is FailureKind.TRANSIENT and error.status not in (200, 500):
            raise UserError(complaint(error, self._settings))
        return error.failure


def _read_choice(reply: Reply) -> tuple[Choice | Failure, bool]:
    return to_choice(reply, _YES_NO), has_alternatives(reply)
