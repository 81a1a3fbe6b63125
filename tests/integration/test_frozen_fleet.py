"""The frozen LM's own actors: clients at once, usage, and actors that die under a call."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
import ray
import torch
from transformers import BloomConfig, BloomForCausalLM

from lmcot.actors.fleet import Fleet
from lmcot.actors.frozen_actor import FrozenActor
from lmcot.actors.frozen_client import FrozenClient
from lmcot.actors.reward_actor import RewardActor
from lmcot.actors.units import Packed, Scored, ScoreUnit
from lmcot.config import (
    ASPECTS,
    ActorsSettings,
    CacheSettings,
    PromptSettings,
    RoleSettings,
    TransformersFrozen,
    parse_config,
)
from lmcot.errors import UserError
from lmcot.frozen.open import open_frozen_lm
from lmcot.models.sources import load_tokenizer
from lmcot.records import (
    Choice,
    Completion,
    Example,
    Message,
    Paragraph,
    Prompt,
    Rollout,
    Sampling,
    Score,
    Usage,
)
from lmcot.rewards.learned import LearnedAspect, LearnedModel, save_learned
from tests.conftest import TinyModel

pytestmark = pytest.mark.usefixtures("cluster", "one_thread")

SETTINGS = ActorsSettings(unit_timeout_s=60, start_timeout_s=120)
GREEDY = Sampling(max_new_tokens=6)
CLIENTS = 4


def _settings(
    folder: Path | None, batching: Literal["unit", "dynamic"] = "dynamic", kind: str = "llama"
) -> TransformersFrozen:
    return TransformersFrozen(
        backend="transformers",
        source=f"random:{kind}",
        dtype="float32",
        batching=batching,
        cache=CacheSettings(enabled=folder is not None, folder=str(folder) if folder else None),
    )


def _fleet(settings: TransformersFrozen, count: int = 1) -> Fleet[FrozenActor]:
    return Fleet(
        "frozen-LM", FrozenActor, RoleSettings(count=count, cpus=0.5), SETTINGS,
        arguments={"settings": settings, "prompts": PromptSettings(), "threads": 1},
        calls_at_once=settings.calls_at_once,
    )  # fmt: skip


def _client(fleet: Fleet[FrozenActor]) -> FrozenClient:
    return FrozenClient(fleet.handles, limit_s=60, attempts=3)


def _prompts(client: int) -> list[Prompt]:
    return [(Message("user", f"Where is lake {client} {number}?"),) for number in range(3)]


@pytest.fixture(scope="module")
def shared(
    cluster: None, tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet[FrozenActor]]:
    """One actor with a cache, for tests that leave it as it is."""
    tiny("llama")  # makes the model's files: the actor only reads them
    with _fleet(_settings(tmp_path_factory.mktemp("cache"))) as fleet:
        fleet.wait_ready()
        yield fleet


def test_clients_at_once_get_what_each_would_get_alone(shared: Fleet[FrozenActor]) -> None:
    """Texts to the letter; probabilities up to the rounding of the arithmetic."""
    alone = open_frozen_lm(_settings(None), PromptSettings())
    assert _settings(None).calls_at_once == 32
    assert _settings(None, "unit").calls_at_once == 1
    clients = [_client(shared) for _ in range(CLIENTS)]

    def ask(number: int) -> tuple[list[object], list[object], list[object]]:
        lm, prompts = clients[number], _prompts(number)
        return (
            list(lm.generate(prompts, GREEDY)),
            list(lm.choose(prompts, ("yes", "no"))),
            list(lm.score(prompts, ["one", "two", "three"])),
        )

    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(ask, range(CLIENTS)))
        again = list(pool.map(ask, range(CLIENTS)))
    assert again == found  # from the cache
    for number, (texts, choices, scores) in enumerate(found):
        prompts = _prompts(number)
        assert texts == alone.generate(prompts, GREEDY)
        for choice, wanted in zip(choices, alone.choose(prompts, ("yes", "no")), strict=True):
            assert isinstance(choice, Choice)
            assert isinstance(wanted, Choice)
            assert choice.probabilities == pytest.approx(wanted.probabilities, abs=1e-5)
        both = zip(scores, alone.score(prompts, ["one", "two", "three"]), strict=True)
        for score, reference in both:
            assert isinstance(score, Score)
            assert isinstance(reference, Score)
            assert score.logprob == pytest.approx(reference.logprob, abs=1e-4)
    for client in clients:
        assert (client.usage.asked, client.usage.sent) == (18, 9)
        assert client.usage.tokens > 0


def test_a_call_goes_to_another_actor_when_its_own_dies(tmp_path: Path) -> None:
    with _fleet(_settings(tmp_path, "unit"), count=2) as fleet:
        fleet.wait_ready()
        client = _client(fleet)
        ray.kill(fleet.handles[0], no_restart=False)
        replies = client.generate(_prompts(0), GREEDY)
        assert all(isinstance(reply, Completion) for reply in replies)
        assert client.usage == Usage(3, 3, client.usage.tokens)
        # The one that was restarted loads its model by itself, whoever asks it first.
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert all(isinstance(r, Completion) for r in client.generate(_prompts(1), GREEDY))
            if client._next == 1:  # the next one after the actor that was restarted
                break
        else:
            pytest.fail("the actor that died never answered again")


def test_a_unit_that_takes_too_long_is_the_users_to_mend(tmp_path: Path) -> None:
    """Told before the fleet takes the reward actor to hang; its calls share one limit."""
    with _fleet(_settings(None, "unit")) as fleet:
        fleet.wait_ready()
        late = FrozenClient(fleet.handles, limit_s=0.2, attempts=3)
        late.begin_unit()
        with pytest.raises(
            UserError, match=r"a work unit in 0 s \(at 'generate'\): raise actors\."
        ):
            late.generate(_prompts(0) * 40, Sampling(max_new_tokens=400))


def test_a_model_on_the_plain_path_is_told_to_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The actors' own output ends in Ray's logs."""
    settings = _settings(None).model_copy(update={"source": str(_bloom(tmp_path))})
    with _fleet(settings, count=2) as fleet:
        fleet.wait_ready()
    told = capsys.readouterr().err
    assert told.count("frozen-LM actors: BloomForCausalLM generates on the plain path") == 1


def _bloom(folder: Path) -> Path:
    """A random Bloom: its distances are biases (ALiBi) that the engine does not take over."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("random:llama")
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_actor_holds_learned_aspects_to_their_frozen_lm(
    shared: Fleet[FrozenActor], tmp_path: Path
) -> None:
    identity, parameters = ray.get(shared.handles[0].describe.remote(), timeout=60)
    assert parameters > 0
    judged = _judge_with(shared, tmp_path, fitted_to=identity)
    assert judged.failures == ()
    components = json.loads(judged.records)["judgement"]["components"]
    # Odds of 1 + 2 (x - 0.5) at a factuality of 1: the judge's word weighs nothing here.
    assert components["aspect/factuality"] == pytest.approx(1 / (1 + math.exp(-2.0)))
    assert (judged.usage.asked, judged.usage.sent) == (2, 2)  # an answer and a judgement
    with pytest.raises(UserError, match="fitted to the judgements of 'another'"):
        _judge_with(shared, tmp_path, fitted_to="another")


def _judge_with(fleet: Fleet[FrozenActor], folder: Path, fitted_to: str) -> Scored:
    one = LearnedAspect(
        mean=(0.5, 0.0), scale=(1.0, 1.0), coef=(2.0, 0.0), intercept=1.0,
        auc=0.7, auc_interval=(0.6, 0.8), labels=20, questions=10,
    )  # fmt: skip
    model = LearnedModel(
        features=("metrics/factuality", "judge/factuality"),
        frozen=fitted_to,
        aspects={"factuality": one},
    )
    save_learned(model, folder / "aspects.json")
    config = parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": "random:llama"},
            "frozen": {"backend": "transformers", "source": "random:llama"},
            "refine": {"start_from": "base"},
            "prompts": {"demonstrations": 0},
            "rewards": {
                "kind": "guidance",
                "learned_model": str(folder / "aspects.json"),
                "aspects": {
                    **{name: {"source": "off"} for name in ASPECTS},
                    "factuality": {"source": "learned", "weight": 1.0},
                },
            },
        }
    )
    actor = RewardActor(config)
    actor.setup(fleet.handles)
    passage = Paragraph("Elko", ("Elko straddles the Humboldt River.",))
    example = Example("q", "Which river does Elko straddle?", "Humboldt River", (passage,))
    text = "Elko straddles the Humboldt River."
    rollout = Rollout("u", "q", 0, (1,), (2,), (-0.1,), "eos", text, 0)
    return actor.score(ScoreUnit("u", Packed.of((example,)), Packed.of([rollout])))
