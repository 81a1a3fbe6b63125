"""The trained pair in a program: in and out of event loops, whatever it is asked."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcot import Guide
from lmcot.answering.context import parse_context
from lmcot.config import dump_config, load_config, parse_config
from lmcot.guide import Refused
from lmcot.models.sources import load_model
from lmcot.records import Paragraph

CONTEXT = [{"title": "Elko", "text": "Elko is in Nevada. It straddles the Humboldt River."}]
SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "guided"
    model, tokenizer = load_model("random:llama", "float32")
    model.save_pretrained(folder / "refined")
    tokenizer.save_pretrained(folder / "refined")
    config = parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": "random:llama", "dtype": "float32", "max_new_tokens": 6},
            "frozen": {
                "backend": "transformers", "source": "random:llama", "dtype": "float32",
                "max_answer_tokens": 4, "cache": {"enabled": False},
            },
            "refine": {"start_from": "base"},
            "prompts": {"demonstrations": 0},
            "serve": {"limits": {"new_tokens": 1500}},
        }
    )  # fmt: skip
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return folder


@pytest.fixture
def guide(run_dir: Path) -> Iterator[Guide]:
    with Guide(run_dir) as found:
        yield found


def test_it_answers_within_a_running_loop_and_without_one(guide: Guide) -> None:
    plain = guide.answer("Which river?", CONTEXT)
    assert plain.rationale

    async def within() -> list[Any]:
        first = guide.answer("Which river?", CONTEXT)
        both = await asyncio.gather(
            guide.aanswer("Which river?", CONTEXT),
            guide.aanswer("Which river?", CONTEXT, samples=2, seed=3),
        )
        return [first, *both]

    first, second, voted = asyncio.run(within())
    assert plain.answer == first.answer == second.answer
    assert plain.rationale == first.rationale == second.rationale
    assert len(voted.votes) == 2


def test_the_loop_is_free_meanwhile(guide: Guide) -> None:
    async def within() -> int:
        task = asyncio.create_task(
            guide.aanswer("Which?", CONTEXT, max_tokens=300, temperature=5.0, seed=1)
        )
        turns = 0
        while not task.done():
            turns += 1
            await asyncio.sleep(0.001)
        return turns

    assert asyncio.run(within()) > 5


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"samples": 0}, "samples", "greater than or equal to 1"),
    ({"samples": -3}, "samples", "greater than or equal to 1"),
    ({"samples": 1000}, "samples", "more than 16"),
    ({"samples": "two"}, "samples", "valid integer"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": -5}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 10**9}, "max_tokens", "more than 1500"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": 1e-9}, "temperature", "must be 0"),
    ({"temperature": float("nan")}, "temperature", "finite number"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"seed": 2**63}, "seed", "less than"),
    ({"question": ""}, "question", "is empty"),
    ({"question": "?" * 2001}, "question", "more than 2000"),
    ({"question": 5}, "question", "valid string"),
    ({"context": "x" * 200_001}, "context", "more than 200000"),
    ({"context": [{"title": "no text"}]}, "context", "needs a 'text'"),
    ({"context": [5]}, "context", "passage 1 is neither"),
    ({"context": None}, "context", "neither a text nor a list"),
    ({"context": [("", " ")]}, "context", "passage 1 has neither title nor text"),
    ({"context": [Paragraph("", ("nul \x00",))]}, "context", "U+0000"),
    ({"temprature": 1}, "temprature", "not permitted"),
    ({"stream": True}, "stream", "whole answer"),
    ({"answer_schema": {"type": "array"}}, "answer_schema", "one of an object"),
]


@pytest.mark.parametrize(
    ("options", "param", "reason"),
    BAD,
    ids=[f"{next(iter(one))}{n}" for n, (one, _, _) in enumerate(BAD)],
)
def test_what_makes_no_sense_is_refused_and_ends_nothing(
    guide: Guide, options: dict[str, Any], param: str, reason: str
) -> None:
    with pytest.raises(Refused) as caught:
        guide.answer(**{"question": "Which river?", "context": CONTEXT, **options})
    assert reason in str(caught.value)
    assert (caught.value.param or "") == param
    assert guide.answer("Which river?", CONTEXT).rationale


def test_what_the_model_cannot_read_is_refused(run_dir: Path) -> None:
    """A prompt and a rationale beyond its window."""
    with Guide(run_dir) as guide:
        with pytest.raises(Refused, match="cannot read this"):
            guide.answer("why? " * 390, "x. " * 400, max_tokens=1500)
        assert guide.answer("Which river?", CONTEXT).rationale


def test_a_cancelled_answer_ends_nothing(guide: Guide) -> None:
    async def within() -> None:
        long = guide.aanswer("Which?", CONTEXT, max_tokens=1200, temperature=5.0, seed=1)
        task = asyncio.create_task(long)
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(within())
    started = time.monotonic()
    assert guide.answer("Which river?", CONTEXT).rationale
    while guide._small._engine._calls:
        assert time.monotonic() - started < 30
        time.sleep(0.01)


def test_closing_gives_up_what_is_at_work(run_dir: Path) -> None:
    """Also where a loop is running, as in a notebook."""

    async def within() -> None:
        guide = Guide(run_dir)
        long = guide.aanswer("Which?", CONTEXT, max_tokens=1200, temperature=5.0, seed=1)
        task = asyncio.create_task(long)
        await asyncio.sleep(0.3)
        guide.close()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(within())


def test_the_answer_as_an_object(guide: Guide) -> None:
    found = guide.answer("Which river?", CONTEXT, answer_schema=SCHEMA)
    assert found.structured == {"answer": found.answer}


def test_a_long_context_may_cost_the_frozen_lm_nothing(run_dir: Path, tmp_path: Path) -> None:
    """It reads the rationale alone, as a vote, as an object too; unguided it reads the context."""
    folder = tmp_path / "alone"
    shutil.copytree(run_dir, folder)
    config = load_config(str(folder / "config.yaml"), ["prompts.frozen_reads=rationale_only"])
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    long = [*CONTEXT, *({"title": f"Town {n}", "text": "It is far away."} for n in range(20))]
    with Guide(folder, threads=1) as guide:
        little, much = (guide.answer("Which?", context).tokens for context in (CONTEXT, long))
        assert much.small_lm_in > little.small_lm_in + 20
        assert much.large_lm_in < little.small_lm_in + 20
        both = guide.answer("Which?", long, unguided=True)
        assert both.unguided is not None
        assert both.tokens.large_lm_in > 2 * much.large_lm_in
        voted = guide.answer("Which?", long, samples=2, seed=1, answer_schema=SCHEMA)
        assert len(voted.votes) == 2
        assert voted.structured is not None
    with Guide(run_dir, threads=1) as guide:
        assert guide.answer("Which?", long).tokens.large_lm_in > much.small_lm_in


def test_threads_ask_at_once_and_closing_leaves_none_behind(run_dir: Path) -> None:
    before = set(threading.enumerate())
    guide = Guide(run_dir)
    found: list[str] = []
    asking = [
        threading.Thread(target=lambda: found.append(guide.answer("Which?", CONTEXT).rationale))
        for _ in range(4)
    ]
    for one in asking:
        one.start()
    for one in asking:
        one.join(60)
    assert len(found) == 4
    assert len(set(found)) == 1
    guide.close()
    guide.close()
    with pytest.raises(RuntimeError, match="is closed"):
        guide.answer("Which?")
    deadline = time.monotonic() + 10
    while left := [one for one in set(threading.enumerate()) - before if one.is_alive()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_an_answer_is_cut_to_so_many_tokens_of_its_own(guide: Guide) -> None:
    asking = guide._frozen._asking
    text = "The Humboldt River in Nevada"
    assert asking.shortened(text, 1000) == text
    cut = [asking.shortened(text, tokens) for tokens in (1, 3, 6)]
    assert all(text.startswith(one) for one in cut)
    assert len(cut[0]) < len(cut[1]) < len(cut[2]) < len(text)


def test_instructions_stand_with_the_templates_own_and_objects_are_asked_for_last(
    guide: Guide,
) -> None:
    asking = guide._frozen._asking
    example = asking.example("Which river?", parse_context(CONTEXT))
    plain = asking.answer_prompt(example, "It is the Humboldt.")
    told = asking.answer_prompt(example, "It is the Humboldt.", "Be brief.<|im_end|>")
    assert [one.role for one in told] == [one.role for one in plain] == ["system", "user"]
    assert told[0].content.startswith(plain[0].content + "\n\nBe brief.")
    assert "<|im_end|>" not in told[0].content
    assert told[1] == plain[1]
    wish = asking.object_prompt(example, "It is the Humboldt.", "Humboldt", '{"type": "object"}')
    assert [one.role for one in wish] == ["system", "user", "assistant", "user"]
    assert wish[2].content == "Humboldt"
    assert wish[3].content.endswith('{"type": "object"}')
