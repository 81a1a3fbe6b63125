"""The frozen LM's cache: what it keeps, for whom, how much, and what a killed writer leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lmcot.cli import main
from lmcot.config import FrozenSettings, PromptSettings
from lmcot.errors import UserError
from lmcot.frozen import cached
from lmcot.frozen.backend import FrozenBackend
from lmcot.frozen.cache import Held, ReplyCache, cache_path
from lmcot.frozen.cached import CachedLM, Method, Replies
from lmcot.records import (
    Choice,
    Completion,
    Failure,
    FailureKind,
    Message,
    Prompt,
    Sampling,
    Score,
    Usage,
)

GIB = 2**30
GREEDY = Sampling(max_new_tokens=8)


def _prompt(text: str) -> Prompt:
    return (Message("user", text),)


class Counting(FrozenBackend):
    """A frozen LM whose replies tell when they were made."""

    def __init__(self, identity: str = "counting") -> None:
        self._identity = identity
        self.asked: list[str] = []

    @classmethod
    def open(cls, settings: FrozenSettings, prompts: PromptSettings) -> Counting:
        raise NotImplementedError("no settings are of this kind")

    @property
    def identity(self) -> str:
        return self._identity

    @property
    def parameters(self) -> int:
        return 7

    def _next(self, prompts: Sequence[Prompt]) -> list[int]:
        numbers = []
        for prompt in prompts:
            numbers.append(len(self.asked))
            self.asked.append(prompt[0].content)
        return numbers

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion | Failure]:
        return [
            Failure(FailureKind.TRANSIENT, "not today")
            if prompt[0].content == "fails"
            else Completion(f"reply {number} \u00e9", 3, number, "stop")
            for prompt, number in zip(prompts, self._next(prompts), strict=True)
        ]

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        third = 1 / 3
        return [
            Choice({options[0]: third, options[1]: 1 - third}, n, 0) for n in self._next(prompts)
        ]

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        return [Score(-0.1 * n, 1, 2) for n in self._next(prompts)]


def _cached(
    tmp_path: Path, *, whole_calls: bool = False, **changes: Any
) -> tuple[CachedLM, Counting]:
    inner = Counting(**changes)
    cache = ReplyCache(tmp_path / "replies.sqlite", GIB)
    return CachedLM(inner, cache, whole_calls=whole_calls), inner


def test_prompts_that_are_rendered_otherwise_are_other_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = _cached(tmp_path)
    first.generate([_prompt("a")], GREEDY)
    monkeypatch.setattr(cached, "render_plain", lambda prompt: "in another version of lmcot")
    second, inner = _cached(tmp_path)
    second.generate([_prompt("a")], GREEDY)
    assert inner.asked == ["a"]


def test_usage_tells_what_the_model_was_sent(tmp_path: Path) -> None:
    """Duplicates within a call are asked once; what the cache answers takes no tokens."""
    lm, inner = _cached(tmp_path)
    prompts = [_prompt("a"), _prompt("b"), _prompt("a"), _prompt("fails")]

    def usage(method: Method, argument: Any) -> Usage:
        return lm.replies(method, prompts, argument).usage

    # "a" and "b" read 3 tokens each and write 0 and 1; what the failure took is not known.
    assert usage("generate", GREEDY) == Usage(asked=4, sent=3, tokens=7)
    assert usage("generate", GREEDY) == Usage(asked=4, sent=1, tokens=0)  # the failure, again
    assert usage("score", ["x"] * 4) == Usage(asked=4, sent=3, tokens=6)
    assert Usage(1, 2, 3) + Usage(10, 20, 30) == Usage(11, 22, 33)
    unseeded = Sampling(max_new_tokens=8, temperature=1.0)
    assert usage("generate", unseeded).sent == 4  # each draw is another
    always = CachedLM(inner, None, whole_calls=False)
    again = [always.replies("generate", prompts[:2], GREEDY) for _ in range(2)]
    assert [one.usage.sent for one in again] == [2, 2]
    assert isinstance(again[0], Replies)


def test_a_reply_comes_again_from_the_cache_and_equals_the_first(tmp_path: Path) -> None:
    """Across processes' ends: a second cache on the same file knows what the first one kept."""
    prompts = [_prompt("a"), _prompt("b")]
    first, inner = _cached(tmp_path)
    told = (
        first.generate(prompts, GREEDY),
        first.choose(prompts, ("yes", "no")),
        first.score(prompts, ["x", "y"]),
    )
    second, other = _cached(tmp_path)
    again = (
        second.generate(prompts, GREEDY),
        second.choose(prompts, ("yes", "no")),
        second.score(prompts, ["x", "y"]),
    )
    assert again == told
    assert (len(inner.asked), other.asked) == (6, [])


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": _prompt("other")},
        {"prompt": (Message("system", "a"),)},
        {"prompt": (Message("user", "a"), Message("user", ""))},
        {"sampling": Sampling(max_new_tokens=9)},
        {"sampling": Sampling(max_new_tokens=8, stop=("\n",))},
        {"sampling": Sampling(max_new_tokens=8, temperature=0.5, seed=1)},
        {"identity": "another"},
    ],
)
def test_what_a_request_is_made_of_is_its_key(tmp_path: Path, change: dict[str, Any]) -> None:
    lm, _ = _cached(tmp_path)
    lm.generate([_prompt("a")], GREEDY)
    other, inner = _cached(tmp_path, identity=change.get("identity", "counting"))
    other.generate([change.get("prompt", _prompt("a"))], change.get("sampling", GREEDY))
    assert len(inner.asked) == 1


def test_seeded_replies_are_kept_and_free_draws_are_not(tmp_path: Path) -> None:
    lm, inner = _cached(tmp_path)
    for seed, asked in ((5, 1), (5, 1), (6, 2), (None, 3), (None, 4)):
        lm.generate([_prompt("a")], Sampling(8, temperature=1.0, seed=seed))
        assert len(inner.asked) == asked


def test_failures_are_asked_again(tmp_path: Path) -> None:
    lm, inner = _cached(tmp_path)
    for _ in range(2):
        found = lm.generate([_prompt("fails"), _prompt("works")], GREEDY)
        assert isinstance(found[0], Failure)
        assert isinstance(found[1], Completion)
    assert inner.asked == ["fails", "works", "fails"]


def test_the_same_request_twice_in_one_call_is_asked_once(tmp_path: Path) -> None:
    lm, inner = _cached(tmp_path)
    found = lm.generate([_prompt("a"), _prompt("b"), _prompt("a")], GREEDY)
    assert inner.asked == ["a", "b"]
    assert found[0] == found[2] != found[1]


def test_whole_calls_are_found_together_or_not_at_all(tmp_path: Path) -> None:
    """Rounding depends on company: a prompt in other company is another request."""
    lm, inner = _cached(tmp_path, whole_calls=True)
    both = lm.generate([_prompt("a"), _prompt("b")], GREEDY)
    assert lm.generate([_prompt("a"), _prompt("b")], GREEDY) == both
    assert inner.asked == ["a", "b"]
    lm.generate([_prompt("a")], GREEDY)
    lm.generate([_prompt("b"), _prompt("a")], GREEDY)
    assert inner.asked == ["a", "b", "a", "b", "a"]
    assert len(lm.generate([_prompt("a"), _prompt("a")], GREEDY)) == 2


def test_a_whole_call_with_one_reply_lost_is_asked_whole(tmp_path: Path) -> None:
    lm, inner = _cached(tmp_path, whole_calls=True)
    lm.generate([_prompt("a"), _prompt("b")], GREEDY)
    with sqlite3.connect(tmp_path / "replies.sqlite") as connection:
        connection.execute("DELETE FROM replies WHERE key = (SELECT MIN(key) FROM replies)")
    connection.close()
    lm.generate([_prompt("a"), _prompt("b")], GREEDY)
    assert inner.asked == ["a", "b", "a", "b"]


def test_the_size_is_bounded_and_the_least_recently_used_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ReplyCache(tmp_path / "replies.sqlite", 10_000)
    clock = 1_000_000.0
    monkeypatch.setattr(time, "time", lambda: clock)
    for number in range(200):
        clock += 1000
        cache.put("m", [(number.to_bytes(2), "x" * 98)])
        assert cache.get([(0).to_bytes(2)]) == ["x" * 98], "what is read again and again stays"
        assert sum(one.bytes for one in cache.held()) <= 10_000
    (held,) = cache.held()
    assert 80 <= held.replies <= 100
    assert held.bytes == 100 * held.replies
    assert cache.get([(199).to_bytes(2), (1).to_bytes(2)]) == ["x" * 98, None]


def test_what_is_held_is_told_and_cleared_by_model(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path / "replies.sqlite", GIB)
    cache.put("one", [(b"a", "12"), (b"b", "345")])
    cache.put("two", [(b"c", "\u00e9")])
    assert cache.held() == [Held("one", 2, 7), Held("two", 1, 3)]
    cache.clear("one")
    assert cache.held() == [Held("two", 1, 3)]
    cache.clear()
    assert cache.held() == []
    assert cache.get([b"a", b"c"]) == [None, None]


@pytest.mark.parametrize("content", [b"no database at all " * 100, b""])
def test_a_file_that_is_none_of_ours(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "replies.sqlite"
    path.write_bytes(content)
    if content:
        with pytest.raises(UserError, match=r"replies.sqlite cannot be opened .*remove the file"):
            ReplyCache(path, GIB)
    else:
        assert ReplyCache(path, GIB).get([b"a"]) == [None]


def test_another_format_and_a_folder_that_is_a_file_are_refused(tmp_path: Path) -> None:
    ReplyCache(tmp_path / "replies.sqlite", GIB).close()
    with sqlite3.connect(tmp_path / "replies.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(UserError, match="its format is 99"):
        ReplyCache(tmp_path / "replies.sqlite", GIB)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"frozen\.cache\.folder"):
        ReplyCache(tmp_path / "file" / "replies.sqlite", GIB)


def _write_on(path: Path, writer: int, max_bytes: int) -> None:
    cache = ReplyCache(path, max_bytes)
    chooser = random.Random(writer)
    while True:
        keys = [chooser.randrange(500).to_bytes(2) for _ in range(5)]
        for key, reply in zip(keys, cache.get(keys), strict=True):
            assert reply in (None, _reply_to(key))
        cache.put(f"writer {writer}", [(key, _reply_to(key)) for key in keys])


def _reply_to(key: bytes) -> str:
    return key.hex() * 50


def test_writers_that_are_killed_leave_whole_replies(tmp_path: Path) -> None:
    """Four at once, with eviction going on; one after the other is killed at a random time."""
    path = tmp_path / "replies.sqlite"
    spawn = multiprocessing.get_context("spawn")
    writers = [
        spawn.Process(target=_write_on, args=(path, writer, 40_000), daemon=True)
        for writer in range(4)
    ]
    for writer in writers:
        writer.start()
    cache = ReplyCache(path, 40_000)
    deadline = time.monotonic() + 60
    while len(cache.held()) < 3:
        assert time.monotonic() < deadline, "waited 60 s for the writers' first replies"
        time.sleep(0.05)
    chooser = random.Random(0)
    for writer in writers:
        time.sleep(chooser.uniform(0.05, 0.4))
        assert writer.is_alive(), "a writer met a reply that was not whole, or a lock"
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    every = [number.to_bytes(2) for number in range(500)]
    found = dict(zip(every, cache.get(every), strict=True))
    assert any(found.values())
    assert all(reply in (None, _reply_to(key)) for key, reply in found.items())
    held = cache.held()
    assert sum(one.replies for one in held) == sum(reply is not None for reply in found.values())
    assert sum(one.bytes for one in held) <= 40_000
    cache.put("after", [(b"key", "reply")])
    assert cache.get([b"key"]) == ["reply"]
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (total,) = connection.execute("SELECT bytes FROM held").fetchone()
    connection.close()
    assert total == sum(one.bytes for one in cache.held())


def test_the_command_shows_and_clears_by_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--folder", str(tmp_path)]
    assert main(["cache", "show", *folder]) == 0
    assert capsys.readouterr().out.startswith("there is no cache at ")
    cache = ReplyCache(cache_path(str(tmp_path)), GIB)
    cache.put("one", [(b"a", "{}"), (b"b", "{}")])
    cache.put("two", [(b"c", "{}")])
    assert main(["cache", "show", *folder]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[-1]) for line in shown[:2]] == [("2", "one"), ("1", "two")]
    assert shown[2][0] == "3"
    assert main(["cache", "show", "--json", *folder]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [(one["model"], one["replies"]) for one in models] == [("one", 2), ("two", 1)]
    assert main(["cache", "clear", "--model", "one", *folder]) == 0
    assert capsys.readouterr().out.startswith("dropped 2 replies from ")
    assert [held.model for held in cache.held()] == ["two"]
    assert main(["cache", "clear", "--json", *folder]) == 0
    (dropped,) = json.loads(capsys.readouterr().out)["dropped"]
    assert (dropped["model"], cache.held()) == ("two", [])


def test_threads_share_a_cache(tmp_path: Path) -> None:
    """One connection for the clients of one actor."""
    cache = ReplyCache(tmp_path / "replies.sqlite", GIB)

    def use(number: int) -> list[str | None]:
        keys = [bytes([number, place]) for place in range(20)]
        for key in keys:
            cache.put("model", [(key, f"reply {number}")])
        return cache.get(keys)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(use, range(8)))
    assert found == [[f"reply {number}"] * 20 for number in range(8)]
    assert cache.held() == [Held("model", 160, 160 * (2 + len("reply 0")))]
