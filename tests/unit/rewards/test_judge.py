"""Judgements of rationales, with a frozen LM whose answers are known."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcot.config import Aspect, AspectSettings, GuidanceRewards, IncreasingRewards
from lmcot.data import load_templates
from lmcot.data.tasks import EXTRACTIVE_QA
from lmcot.errors import UserError
from lmcot.records import (
    Choice,
    Completion,
    Example,
    Failure,
    FailureKind,
    Judgement,
    Paragraph,
    Prompt,
    Rollout,
    Sampling,
    Score,
    ScoredRollout,
)
from lmcot.rewards.combine import increasing_reward, judge_increasing, scalar_reward
from lmcot.rewards.judge import RewardModel, answer_prompts
from lmcot.rewards.scoring import columns
from lmcot.text.visible import NOT_SHOWN
from lmcot.training.step_metrics import step_metrics

ASPECTS: tuple[Aspect, ...] = (
    "factuality",
    "relevance",
    "logicality",
    "consistency",
    "coherence",
    "fluency",
    "naturalness",
    "readability",
)
EXAMPLE = Example(
    id="1",
    question="Which river does Elko straddle?",
    answer="Humboldt River",
    context=(Paragraph("Elko", ("The city straddles the Humboldt River.",)),),
)
RIGHT = "Elko straddles the Humboldt River. So the answer is Humboldt River."
WRONG = "Elko straddles the Colorado River. So the answer is Colorado River."


class KnownLM:
    """Concludes as the rationale in its prompt does; fails where it is told to."""

    identity = "known"
    parameters = None

    def __init__(self, yes: float = 0.75, logprob: float = -6.0, broken: str = "never") -> None:
        self.yes, self.logprob, self.broken = yes, logprob, broken
        self.asked: list[tuple[str, Prompt]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion | Failure]:
        assert sampling.temperature == 0
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: Prompt) -> Completion | Failure:
        failure = self._failure("generate", prompt)
        right = "Humboldt" in prompt[-1].content.split("reasoning:")[1]
        text = " The answer is Humboldt River." if right else " Colorado River"
        return failure or Completion(text, 50, 4, "stop")

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        probabilities = dict(zip(options, (self.yes, 1 - self.yes), strict=True))
        return [self._failure("choose", p) or Choice(probabilities, 50, 0) for p in prompts]

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        assert len(prompts) == len(continuations)
        return [self._failure("score", p) or Score(self.logprob, 12, 60) for p in prompts]

    def _failure(self, call: str, prompt: Prompt) -> Failure | None:
        self.asked.append((call, prompt))
        broken = self.broken == call
        return Failure(FailureKind.TRANSIENT, f"{call} timed out") if broken else None


WEIGHED = GuidanceRewards(
    aspects={
        name: AspectSettings(source=one.source, weight=0.1)
        for name, one in GuidanceRewards().aspects.items()
    }
)


def _rollout(text: str) -> Rollout:
    return Rollout("u", "1", 0, (1,), (2,), (-0.5,), "eos", text, 0)


def _model(frozen: KnownLM, rewards: GuidanceRewards | None = None) -> RewardModel:
    return RewardModel(
        rewards or GuidanceRewards(),
        frozen,
        load_templates("default").showing(1),
        max_answer_tokens=24,
    )


def _judge(frozen: KnownLM, *texts: str, rewards: GuidanceRewards | None = None) -> list[Judgement]:
    rollouts = [_rollout(text) for text in texts]
    return _model(frozen, rewards).judge_rollouts([EXAMPLE] * len(texts), rollouts)


def test_components_of_a_right_and_a_wrong_rationale() -> None:
    right, wrong = _judge(KnownLM(), RIGHT, WRONG)
    assert right.failure is None
    assert list(right.components) == ["em", "f1", "inclusion", *(f"aspect/{a}" for a in ASPECTS)]
    assert [right.components[name] for name in ("em", "f1", "inclusion")] == [1, 1, 1]
    assert [wrong.components[name] for name in ("em", "f1", "inclusion")] == [0, 0.5, 0]
    assert (right.contains_gold, wrong.contains_gold) == (True, False)
    assert right.answer is not None
    assert right.answer.text == " The answer is Humboldt River."
    assert right.answer.extracted == "Humboldt River"
    assert (right.answer.tokens_in, right.answer.tokens_out) == (50, 4)
    assert right.components["aspect/factuality"] == 1 > wrong.components["aspect/factuality"]
    assert right.components["aspect/logicality"] == 0.75
    assert right.components["aspect/fluency"] == pytest.approx(math.exp(-6 / 12))


def test_every_aspect_can_be_judged() -> None:
    judge = AspectSettings(source="judge")
    rewards = GuidanceRewards(aspects=dict.fromkeys(ASPECTS, judge))
    frozen = KnownLM(yes=0.9)
    [judgement] = _judge(frozen, RIGHT, rewards=rewards)
    assert {judgement.components[f"aspect/{aspect}"] for aspect in ASPECTS} == {0.9}
    assert len({prompt for call, prompt in frozen.asked if call == "choose"}) == len(ASPECTS)
    assert all(RIGHT in prompt[-1].content for _, prompt in frozen.asked)


def test_an_aspect_that_is_off_is_not_asked_for() -> None:
    rewards = GuidanceRewards(aspects={"logicality": AspectSettings(source="off")})
    frozen = KnownLM()
    [judgement] = _judge(frozen, RIGHT, rewards=rewards)
    assert set(judgement.components) == {"em", "f1", "inclusion"}
    assert [call for call, _ in frozen.asked] == ["generate"]


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_rationale_has_nothing_of_any_aspect_and_is_not_judged(text: str) -> None:
    frozen = KnownLM()
    [judgement] = _judge(frozen, text)
    assert {judgement.components[f"aspect/{aspect}"] for aspect in ASPECTS} == {0}
    assert {call for call, _ in frozen.asked} == {"generate"}


@pytest.mark.parametrize("call", ["generate", "choose", "score"])
def test_a_failed_call_fails_the_judgement(call: str) -> None:
    """[16] A failure is never a reward of zero."""
    [judgement] = _judge(KnownLM(broken=call), RIGHT, rewards=WEIGHED)
    assert judgement == Judgement(failure=Failure(FailureKind.TRANSIENT, f"{call} timed out"))
    with pytest.raises(ValueError, match="no reward"):
        scalar_reward(judgement, GuidanceRewards())


@pytest.mark.parametrize(
    ("frozen", "lost", "reason"),
    [
        (KnownLM(broken="choose"), {"aspect/logicality"}, "choose timed out"),
        (KnownLM(broken="score"), {"aspect/fluency", "likelihood_gain"}, "score timed out"),
        (KnownLM(yes=math.nan), {"aspect/logicality"}, "'aspect/logicality' is nan"),
    ],
)
def test_a_component_of_weight_0_that_fails_is_left_out(
    frozen: KnownLM, lost: set[str], reason: str
) -> None:
    """The reward does not depend on it, and neither does the judgement."""
    rewards = GuidanceRewards(
        aspects={
            "logicality": AspectSettings(source="judge"),
            "fluency": AspectSettings(source="metrics"),
        },
        likelihood_gain_weight=0,
    )
    [judgement] = _judge(frozen, RIGHT, rewards=rewards)
    [whole] = _judge(KnownLM(), RIGHT, rewards=rewards)
    assert judgement.failure is None
    assert set(judgement.unmeasured) == lost
    assert all(reason in one for one in judgement.unmeasured.values())
    assert set(whole.components) - set(judgement.components) == lost
    assert scalar_reward(judgement, rewards) == scalar_reward(whole, rewards) == 1.0

    rollouts = [_rollout(RIGHT), _rollout(RIGHT)]
    scored = [ScoredRollout(rollouts[0], one, 1.0) for one in (judgement, whole)]
    found = columns(rollouts, [judgement, whole], scored)
    assert found["unmeasured"].tolist() == [len(lost), 0]
    for name in lost:
        assert math.isnan(found[f"component/{name}"][0])
        mean = step_metrics(found, 2)[f"component/{name}"]
        assert mean == pytest.approx(whole.components[name])


def test_a_custom_reward_may_look_at_components_of_weight_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rewards = _own(monkeypatch, lambda example, rollout, judgement: 1.0)
    rewards = rewards.model_copy(update={"aspects": GuidanceRewards().aspects})
    [judgement] = _judge(KnownLM(broken="choose"), RIGHT, rewards=rewards)
    assert judgement.failure is not None


def test_texts_are_judged_as_rollouts_are_but_for_the_custom_reward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rewards = _own(monkeypatch, lambda example, rollout, judgement: 1.0)
    [text] = _model(KnownLM(), rewards).judge([EXAMPLE], [RIGHT])
    [rollout] = _judge(KnownLM(), RIGHT, rewards=rewards)
    assert text == replace(
        rollout,
        components={k: v for k, v in rollout.components.items() if k != "custom"},
    )
    assert "custom" in rollout.components


def test_a_failure_is_that_of_its_own_rationale_alone() -> None:
    """[16] The others of the call are judged as they would be without it."""

    class FailsOnTheWrongOne(KnownLM):
        def _failure(self, call: str, prompt: Prompt) -> Failure | None:
            self.broken = "generate" if "Colorado" in prompt[-1].content else "never"
            return super()._failure(call, prompt)

    judgements = _judge(FailsOnTheWrongOne(), RIGHT, WRONG, RIGHT)
    assert [judgement.failure is None for judgement in judgements] == [True, False, True]
    assert judgements[::2] == _judge(KnownLM(), RIGHT, RIGHT)


@pytest.mark.parametrize("call", ["generate", "choose", "score"])
def test_a_call_that_times_out_is_no_judgement(call: str) -> None:
    """[16] What the client raises is not turned into a reward: the unit is done again."""

    class Hangs(KnownLM):
        def _failure(self, asked: str, prompt: Prompt) -> Failure | None:
            if asked == call:
                raise TimeoutError("no reply in 60 s")
            return None

    with pytest.raises(TimeoutError):
        _judge(Hangs(), RIGHT)


def test_a_reply_without_text_fails_the_judgement() -> None:
    """[16] As the client of an endpoint reports it."""
    empty = Failure(FailureKind.PERMANENT, "the endpoint's reply holds no text")

    class Mute(KnownLM):
        def _answer(self, prompt: Prompt) -> Completion | Failure:
            return empty

    assert _judge(Mute(), RIGHT) == [Judgement(failure=empty)]


@pytest.mark.parametrize(
    ("reply", "failed", "missing"),
    [
        (Completion("", 50, 24, "length", "Hm. So"), True, None),
        (Completion(" ", 50, 24, "length", NOT_SHOWN), True, None),
        (Completion("", 50, 24, "length"), False, "cut"),
        (Completion("", 50, 24, "stop", "Hm."), False, "empty"),
        (Completion("It is, as far as", 50, 24, "length"), False, "cut"),
        (Completion("Humboldt River", 50, 24, "stop", "Hm."), False, ""),
    ],
)
def test_a_reply_cut_in_thinking_is_no_reward_of_zero(
    reply: Completion, failed: bool, missing: str | None
) -> None:
    class Thinks(KnownLM):
        def _answer(self, prompt: Prompt) -> Completion | Failure:
            return reply

    (found,) = _judge(Thinks(), RIGHT)
    if failed:
        assert found.failure is not None
        assert found.failure.kind is FailureKind.PERMANENT
        assert "raise frozen.max_thinking_tokens" in found.failure.reason
        assert found.components == {}
    else:
        assert found.answer is not None
        assert found.answer.missing == missing


def test_the_best_right_answer_is_rewarded() -> None:
    known = replace(EXAMPLE, answer="The Humboldt", aliases=("Humboldt River",))
    (found,) = _model(KnownLM()).judge([known], [RIGHT])
    assert [found.components[name] for name in ("em", "f1", "inclusion")] == [1, 1, 1]
    assert found.contains_gold is True


def test_a_judgement_without_components_has_no_reward() -> None:
    """[16] It says nothing, not zero."""
    with pytest.raises(KeyError):
        scalar_reward(Judgement(), GuidanceRewards())


@pytest.mark.parametrize(
    "frozen", [KnownLM(yes=math.nan), KnownLM(yes=math.inf), KnownLM(logprob=math.nan)]
)
def test_a_component_that_is_no_number_fails_the_judgement(frozen: KnownLM) -> None:
    """[16] A NaN never enters a batch."""
    [judgement] = _judge(frozen, RIGHT, rewards=WEIGHED)
    assert judgement.failure is not None
    assert judgement.failure.kind is FailureKind.PERMANENT
    assert "aspect/" in judgement.failure.reason
    assert not judgement.components


GAIN = GuidanceRewards(aspects={}, likelihood_gain_weight=1.0)


def test_the_likelihood_gain_is_a_component() -> None:
    class Persuaded(KnownLM):
        """Takes the answer for likelier with a rationale that names it."""

        def score(
            self, prompts: Sequence[Prompt], continuations: Sequence[str]
        ) -> list[Score | Failure]:
            assert set(continuations) == {"Humboldt River"}
            texts = [prompt[-1].content for prompt in prompts]
            return [Score(2 * math.log(0.75 if RIGHT in t else 0.5), 2, 60) for t in texts]

    right, wrong = _judge(Persuaded(), RIGHT, WRONG, rewards=GAIN)
    assert right.components["likelihood_gain"] == pytest.approx(0.25)
    assert wrong.components["likelihood_gain"] == 0
    assert scalar_reward(right, GAIN) == pytest.approx(0.5 + 0.5 + 0.25)


def test_unset_the_likelihood_gain_is_not_asked_for() -> None:
    frozen = KnownLM()
    rewards = GuidanceRewards(aspects={})
    assert "likelihood_gain" not in _judge(frozen, RIGHT, rewards=rewards)[0].components
    assert {call for call, _ in frozen.asked} == {"generate"}
    [measured] = _judge(frozen, RIGHT, rewards=GAIN)
    assert measured.components["likelihood_gain"] == 0
    assert {call for call, _ in frozen.asked} == {"generate", "score"}


def test_a_likelihood_gain_that_fails_or_is_no_number_fails_the_judgement() -> None:
    """[16] Neither becomes a gain of zero."""
    [failed] = _judge(KnownLM(broken="score"), RIGHT, rewards=GAIN)
    assert failed == Judgement(failure=Failure(FailureKind.TRANSIENT, "score timed out"))
    [undefined] = _judge(KnownLM(logprob=math.nan), RIGHT, rewards=GAIN)
    assert undefined.failure is not None
    assert "'likelihood_gain' is nan" in undefined.failure.reason
    assert not undefined.components


def _own(monkeypatch: pytest.MonkeyPatch, reward: object) -> GuidanceRewards:
    monkeypatch.setitem(sys.modules, "own_rewards", SimpleNamespace(reward=reward))
    return GuidanceRewards(aspects={}, custom="own_rewards:reward", custom_weight=2.0)


def test_a_custom_reward_sees_the_judgement_and_becomes_a_component(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reward(example: Example, rollout: Rollout, judgement: Judgement) -> float:
        assert example == EXAMPLE
        assert judgement.contains_gold is (rollout.text == RIGHT)
        assert judgement.answer is not None
        return len(judgement.answer.extracted) + judgement.components["f1"]

    rewards = _own(monkeypatch, reward)
    right, wrong = _judge(KnownLM(), RIGHT, WRONG, rewards=rewards)
    assert [one.components["custom"] for one in (right, wrong)] == [14 + 1, 14 + 0.5]
    assert scalar_reward(wrong, rewards) == 0.5 * 0.5 + 2 * 14.5


def test_a_custom_reward_that_is_no_number_fails_the_judgement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """[16] And where the judgement failed already, it is not asked."""
    rewards = _own(monkeypatch, lambda example, rollout, judgement: math.nan)
    [judgement] = _judge(KnownLM(), RIGHT, rewards=rewards)
    assert judgement.failure is not None
    assert judgement.failure.kind is FailureKind.PERMANENT
    assert not judgement.components
    [failed] = _judge(KnownLM(broken="generate"), RIGHT, rewards=rewards)
    assert failed.failure == Failure(FailureKind.TRANSIENT, "generate timed out")


def test_a_custom_reward_is_looked_for_before_anything_is_judged() -> None:
    with pytest.raises(UserError, match="no_such_module"):
        _model(KnownLM(), GuidanceRewards(custom="no_such_module:reward"))


def test_the_scalar_reward_is_the_weighted_sum() -> None:
    rewards = GuidanceRewards(
        em_weight=1.0,
        f1_weight=0.5,
        aspects={
            "factuality": AspectSettings(source="metrics", weight=0.25),
            "logicality": AspectSettings(source="judge", weight=2.0),
            "fluency": AspectSettings(source="metrics"),
        },
    )
    [judgement] = _judge(KnownLM(yes=0.5), WRONG, rewards=rewards)
    # em 0, f1 0.5; factual: straddles, river and elko of elko, straddles, colorado, river in the
    # first sentence, river of colorado and river in the second.
    factuality = (3 / 4 + 1 / 2) / 2
    assert scalar_reward(judgement, rewards) == pytest.approx(
        0.5 * 0.5 + 0.25 * factuality + 2 * 0.5
    )


def test_the_answer_may_rest_on_the_rationale_alone() -> None:
    """The judge still reads the passages: it is asked whether the rationale is true to them."""
    frozen = KnownLM()
    model = RewardModel(WEIGHED, frozen, load_templates("default"), 24, "rationale_only")
    [judgement] = model.judge([EXAMPLE], [RIGHT])
    assert judgement.components["em"] == 1
    passage = EXAMPLE.context[0].sentences[0]
    read = {
        call: any(passage in prompt[-1].content for asked, prompt in frozen.asked if asked == call)
        for call in ("generate", "choose")
    }
    assert read == {"generate": False, "choose": True}


def test_answers_are_read_out_of_completions() -> None:
    prompts = [load_templates("default").guided(EXAMPLE, RIGHT)]
    greedy = Sampling(max_new_tokens=8)
    task, asked = EXTRACTIVE_QA, [EXAMPLE.question]
    [answer] = answer_prompts(KnownLM(), prompts, greedy, task, asked)
    assert not isinstance(answer, Failure)
    assert answer.extracted == "Humboldt River"
    [failed] = answer_prompts(KnownLM(broken="generate"), prompts, greedy, task, asked)
    assert isinstance(failed, Failure)


@pytest.mark.parametrize(
    ("text", "length", "reward"),
    [
        ("1 2 3 4", 4, 1),
        ("1 2 3 4 0 0", 4, 1),
        ("3 2 1 4", 4, 1 / 3),
        ("1 2", 4, 1 / 3),
        ("1 1 2 2", 4, 1 / 3),
        ("-5, 0; 12 and 13.", 4, 1),
        ("1-2-3", 3, 1),
        ("one two", 4, 0),
        ("7", 2, 0),
        ("", 2, 0),
        ("1 " + "9" * 6000, 2, 1),
    ],
)
def test_increasing_reward(text: str, length: int, reward: float) -> None:
    """[30] The toy task's optimum is exactly 1."""
    assert increasing_reward(text, length) == pytest.approx(reward)


@given(st.text(alphabet="0123456789 -,a", max_size=60), st.integers(2, 9))
def test_the_increasing_reward_stays_in_the_unit_interval(text: str, length: int) -> None:
    assert 0 <= increasing_reward(text, length) <= 1


def test_the_toy_task_has_one_component() -> None:
    settings = IncreasingRewards(kind="increasing", length=3)
    [judgement] = judge_increasing([_rollout("1 2 1")], settings)
    assert judgement == Judgement({"increasing": 0.5})
    assert scalar_reward(judgement, settings) == 0.5
