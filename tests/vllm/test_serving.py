"""The service with both models on vLLM: what it writes, streams and cancels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
from ray import serve as ray_serve

from lmcot import Guide
from lmcot.answering.pair import learned, open_pair
from lmcot.config import dump_config, parse_config
from lmcot.errors import UserError
from lmcot.serve.client import Client
from lmcot.serve.run import start
from tests.integration.test_serving import (
    CONTEXT,
    address,
    check_that_leaving_cancels,
    free_port,
)
from tests.vllm.conftest import make_model

OWN_ENGINE = {
    "backend": "transformers", "dtype": "float32", "max_answer_tokens": 6,
    "cache": {"enabled": False},
}  # fmt: skip
WINDOW = 2048


def make_run(folder: Path, small: str, *, vllm: bool) -> Path:
    """A run directory whose pair is on vLLM, or the same pair on lmcot's own engine."""
    folder.mkdir()
    (folder / "refined").symlink_to(small)
    frozen: dict[str, Any] = {**OWN_ENGINE, "source": small}
    if vllm:
        frozen |= {"backend": "vllm", "cache_gib": 0.1}
    config = parse_config(
        {
            "data": {
                "train": {"kind": "sample", "split": "train"},
                "validation": {"kind": "sample", "split": "validation"},
                "context": {"distractors": "all", "max_tokens": 200},
            },
            "policy": {"source": small, "dtype": "float32", "max_new_tokens": 12},
            "frozen": frozen,
            "refine": {"start_from": "base"},
            "prompts": {"demonstrations": 0},
            "serve": {
                "port": free_port(), "limits": {"new_tokens": WINDOW // 2},
                "small": {"vllm": {"cache_gib": 0.1}} if vllm else {},
            },
        }
    )  # fmt: skip
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("small") / "model", window=WINDOW)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, small: str) -> Iterator[Guide]:
    """The pair on lmcot's own engine, in this process."""
    guide = Guide(make_run(tmp_path_factory.mktemp("runs") / "own", small, vllm=False))
    yield guide
    guide.close()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, small: str) -> Iterator[Client]:
    run_dir = make_run(tmp_path_factory.mktemp("runs") / "served", small, vllm=True)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    pair = learned(open_pair(run_dir))
    start(pair)
    yield Client(f"http://127.0.0.1:{pair.config.serve.port}")
    ray_serve.shutdown()
    ray.shutdown()


def test_it_answers_as_on_the_own_engine(client: Client, own: Guide) -> None:
    """A greedy rationale and its answer; a vote over samples repeats by its seed."""
    served = client.answer("Which river?", CONTEXT, unguided=True)
    mine = own.answer("Which river?", CONTEXT, unguided=True)
    assert served["rationale"] == mine.rationale
    assert (served["answer"], served["unguided"]) == (mine.answer, mine.unguided)
    drawn: dict[str, Any] = {"samples": 3, "seed": 7, "temperature": 1.0}
    votes = client.answer("Which river?", CONTEXT, **drawn)["votes"]
    assert len({vote["rationale"] for vote in votes}) == 3
    assert client.answer("Which river?", CONTEXT, **drawn)["votes"] == votes


def test_a_stream_is_what_the_whole_answer_is(client: Client) -> None:
    """By lmcot's own client, and by OpenAI's."""
    events = list(client.stream("Which river?", CONTEXT, seed=3, temperature=1.0))
    text = "".join(data["text"] for name, data in events if name == "token")
    assert text.strip() == events[-1][1]["rationale"]
    compatible = openai.OpenAI(base_url=f"{address(client)}/v1", api_key="none", max_retries=0)
    context = "\n\n".join(one["text"] for one in CONTEXT)
    message: Any = {"role": "user", "content": f"Context: {context}\nQuestion: Which river?"}
    pieces: Any = compatible.chat.completions.create(model="lmcot", messages=[message], stream=True)
    reasoning = "".join(
        (one.choices[0].delta.model_extra or {}).get("reasoning_content", "") for one in pieces
    )
    assert reasoning.strip() == client.answer("Which river?", context)["rationale"]


def test_a_client_that_goes_away_cancels_its_rationale(client: Client) -> None:
    """A rationale that would take seconds; its place is free sooner than that."""
    check_that_leaving_cancels(client, max_tokens=WINDOW // 2, temperature=2.0)


def test_what_vllm_does_not_run_is_refused_before_anything_starts(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", str(tmp_path), vllm=False)
    settings = ["serve.small.vllm.cache_gib=0.1", "policy.source=random:t5"]
    said = (
        r"^serve.small.vllm is set, but the small LM 'random:t5' is an encoder-decoder, which vLLM "
        r"does not run: leave it unset$"
    )
    with pytest.raises(UserError, match=said):
        learned(open_pair(run_dir, "base", settings))
