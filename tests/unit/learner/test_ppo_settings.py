"""What single settings of PPO do: rewards, the reference, the critic, when a step ends."""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from lmcot.errors import UserError
from lmcot.learner.batching import split_evenly
from lmcot.models.sources import load_model, load_tokenizer, save_model
from tests.support.learner_by_hand import alone, plain_policy
from tests.support.learner_cases import (
    BOTH,
    STAGES,
    Layout,
    distance,
    disturb,
    fixed_kl,
    make_config,
    moved,
    open_session,
    parameters,
    rollouts,
    sample,
    score,
)

pytestmark = pytest.mark.usefixtures("one_thread", "model_cache")

LLAMA = "counting-llama"
FOUR = [(2, (2, 2)), (5, (2, 2))]
"""Two questions with two rationales each, of two tokens."""

# ---------------------------------------------------------------- the reference


@BOTH
def test_reference_is_the_first_policy_for_ever(kind: str) -> None:
    """[9] the reference equals the policy at step 0 (KL < 1e-6) and never changes."""
    session = open_session(make_config(kind, {"learning_rate": 1e-2}))
    reference: Any = session._reference
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    assert all(torch.equal(p, session.policy.lm.get_parameter(name)) for name, p in before.items())
    assert not any(p.requires_grad for p in reference.parameters())
    kls = []
    for step in range(3):
        metrics = session.ppo.step(score(sample(session.policy.lm, seed=step)), step)
        kls.append((metrics["kl"], metrics["kl/k3"]))
    assert abs(kls[0][0]) < 1e-6
    assert abs(kls[0][1]) < 1e-6
    assert kls[2][1] > 1e-3
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_an_offloaded_reference_scores_as_any_other() -> None:
    results = []
    for offload in (False, True):
        config = make_config(LLAMA, {"learning_rate": 1e-2}, learner__offload_reference=offload)
        session = open_session(config)
        session.ppo.step(rollouts(LLAMA), 0)
        metrics = session.ppo.step(rollouts(LLAMA), 1)
        assert metrics["kl/k3"] > 1e-4
        assert {p.device.type for p in session._reference.parameters()} == {"cpu"}  # type: ignore[union-attr]
        results.append(metrics)
    assert results[0] == results[1]


def test_negative_kl_is_warned_of() -> None:
    """[15] a negative mean KL is a sign of a bug: here the reference sampled, not the policy."""
    # Above stage 0 the engine's own copy of the parameters would undo the disturbance.
    session = open_session(make_config(LLAMA, learner__zero_stage=0))
    reference = copy.deepcopy(session.policy.lm)
    disturb(session.policy.lm, 0.3)
    questions = [(2, [8] * 4), (5, [8] * 4), (9, [8] * 4)]
    right = session.ppo.step(score(sample(session.policy.lm, questions=questions)), 0)
    assert right["kl"] > 0
    assert right["kl/negative"] == 0
    wrong = session.ppo.step(score(sample(reference, questions=questions)), 1)
    assert wrong["kl"] < 0
    assert wrong["kl/negative"] == 1


# ---------------------------------------------------------------- rewards


def test_rewards_are_clipped_before_the_kl_is_added() -> None:
    """[12] scores are clipped; the KL penalty is not."""
    config = make_config(
        LLAMA,
        reward_clip=1.0,
        advantage={"kind": "gae", "lam": 1.0},
        kl=fixed_kl(0.1),
    )
    session = open_session(config)
    disturb(session._reference, 0.1)
    scored = rollouts(
        LLAMA,
        questions=FOUR,
        rewards=[100.0, -100.0, 0.25, 0.7],
    )
    scores = session.ppo._scores(scored)
    assert scores.tolist() == pytest.approx([1.0, -1.0, 0.25, 0.7])
    experience = session.ppo._maker.make(scored, scores, 0.1)
    metrics = session.ppo._maker.metrics(experience, scores)
    assert metrics["reward/score"] == pytest.approx(0.2375)
    # At gamma 1 and lambda 1 the first return is the score less the whole KL penalty.
    kl = (experience.proximal - experience.reference).sum(-1)
    assert float(kl.abs().max()) > 0.01
    expected = torch.tensor([1.0, -1.0, 0.25, 0.7]) - 0.1 * kl
    torch.testing.assert_close(experience.returns[:, 0], expected, atol=1e-5, rtol=0)


def test_rewards_are_scaled_by_their_spread_over_the_run() -> None:
    """[12] by the standard deviation of all rewards so far, before they are clipped."""
    session = open_session(make_config(LLAMA, scale_rewards=True, reward_clip=2.0))
    first, second = [4.0, 8.0, 8.0, 12.0], [-20.0, 0.0, 2.0, 6.0]
    # Mean 8, squares 16 + 0 + 0 + 16: deviation sqrt(8). The mean stays.
    one = session.ppo.step(rollouts(LLAMA, questions=FOUR, rewards=first), 0)
    expected = [4 / 8**0.5, 2.0, 2.0, 2.0]  # 8 / sqrt(8) = 2.83 is clipped
    assert one["reward/score"] == pytest.approx(statistics.fmean(expected), rel=1e-6)
    deviation = statistics.pstdev(first + second)
    scores = session.ppo._scores(rollouts(LLAMA, questions=FOUR, rewards=second))
    assert scores.tolist() == pytest.approx([-2.0, 0.0, 2 / deviation, 6 / deviation], rel=1e-6)
    assert 6 / deviation < 2


# ---------------------------------------------------------------- the critic


@BOTH
@STAGES
def test_critic_warm_up_trains_the_critic_alone(kind: str, stage: int) -> None:
    """[24] critic warm-up with the policy frozen; what follows moves both.

    The warm-up does not move the policy afterwards either, by what Adam remembers of it.
    """
    critic = {"kind": "model" if kind == LLAMA else "head"}
    config = make_config(
        kind,
        {"learning_rate": 1e-2, "weight_decay": 0.1, "eps": 1e-8},
        Layout(stage, 2048, True),
        advantage={"kind": "gae", "critic_warmup_steps": 2, "critic": critic},
    )
    session = open_session(config)
    history = [parameters(session)]
    for step in range(2):
        metrics = session.ppo.step(rollouts(kind), step)
        assert metrics["optimiser/learning_rate"] == pytest.approx(1e-2)
        history.append(parameters(session))
        trained = moved(*history[-2:])
        assert trained
        assert all(name.startswith("critic.") for name in trained)
    session.ppo.step(rollouts(kind), 2)
    history.append(parameters(session))
    trained = moved(*history[-2:])
    assert {name.split(".")[0] for name in trained} == {"lm", "critic"}
    # Adam's moments of the policy were zero until then: its first step is a whole one, with the
    # bias corrections of the third: (0.1 / 0.271) / sqrt(0.001 / 0.002997) = 0.64.
    name = "lm.model.norm.weight" if kind == LLAMA else "lm.decoder.final_layer_norm.weight"
    kept = history[2][name] * (1 - 1e-2 * 0.1)
    steps = (history[3][name] - kept).abs() / 1e-2
    assert float(steps.max()) == pytest.approx(0.6388, rel=1e-3)


@pytest.mark.parametrize(
    ("stage", "critic"), [(0, "head"), (1, "model"), (2, "head"), (3, "model")]
)
def test_the_critic_has_its_own_learning_rate(stage: int, critic: str) -> None:
    """At its first step Adam moves what has a gradient by its learning rate, at most."""
    config = make_config(
        LLAMA,
        {"learning_rate": 1e-3, "eps": 1e-12},
        Layout(stage, 2048, True),
        advantage={"kind": "gae", "critic": {"kind": critic, "learning_rate": 4e-3}},
    )
    session = open_session(config)
    before = parameters(session)
    metrics = session.ppo.step(rollouts(LLAMA), 0)
    assert metrics["optimiser/learning_rate"] == pytest.approx(4e-3), "the highest"
    after = parameters(session)
    largest = {"lm": 0.0, "critic": 0.0}
    for name in before:
        part = name.split(".")[0]
        step = float((after[name] - before[name]).abs().max())
        largest[part] = max(largest[part], step)
    assert largest == pytest.approx({"lm": 1e-3, "critic": 4e-3}, rel=1e-3)


def test_the_value_loss_is_weighted_and_leaves_the_policy_to_its_own() -> None:
    """[24] a critic model at weight 0 stands still, and the policy moves as it would anyway."""
    afters = []
    for weight in (0.0, 0.5):
        advantage = {"kind": "gae", "critic": {"kind": "model"}, "value_coefficient": weight}
        session = open_session(
            make_config(LLAMA, {"learning_rate": 1e-2, "max_grad_norm": 1e6}, advantage=advantage)
        )
        before = parameters(session)
        session.ppo.step(rollouts(LLAMA), 0)
        afters.append(parameters(session))
        assert any(name.startswith("critic.") for name in moved(before, afters[-1])) == bool(weight)
    parts = [{n: p for n, p in after.items() if n.startswith("lm.")} for after in afters]
    assert distance(parts[0], parts[1]) == 0


@BOTH
def test_a_critic_may_come_from_another_source(tmp_path: Path, kind: str) -> None:
    """[24] its trunk is the other model's; its values begin near zero."""
    other, tokenizer = load_model(f"random:{kind}", "float32")
    disturb(other, 0.1)
    save_model(other, tokenizer, tmp_path / "other")
    advantage = {"kind": "gae", "critic": {"kind": "model", "source": str(tmp_path / "other")}}
    config = make_config(kind, advantage=advantage)
    session = open_session(config)
    critic: Any = session.policy.critic
    trunk = dict(other.named_parameters())
    shared = [name for name, _ in critic.named_parameters() if "lm_head" not in name]
    assert len(shared) > 10
    assert all(torch.equal(critic.get_parameter(name), trunk[name]) for name in shared)
    assert critic.get_output_embeddings().weight.shape == (1, 64)
    policy = plain_policy(config)
    scored = rollouts(kind)
    with torch.no_grad():
        values = torch.cat([alone(policy.lm, critic, one.rollout).values for one in scored])
    assert session.ppo.step(scored, 0)["value/mean"] == pytest.approx(
        float(values.mean()), abs=1e-6
    )
    assert 1e-4 < float(values.abs().max()) < 0.5


@pytest.mark.parametrize(
    ("policy", "critic", "reason"),
    [
        (LLAMA, "llama", "tokenizer is not the policy's"),
        (LLAMA, "counting-t5", "encoder"),
        ("counting-t5", LLAMA, "encoder"),
    ],
)
def test_a_critic_must_read_what_the_policy_reads(policy: str, critic: str, reason: str) -> None:
    """The counting models share a tokenizer, but not an architecture."""
    advantage = {"kind": "gae", "critic": {"kind": "model", "source": f"random:{critic}"}}
    with pytest.raises(UserError, match=rf"refine\.advantage\.critic\.source .*{reason}"):
        open_session(make_config(policy, advantage=advantage))


def test_prompts_are_shared_only_if_the_critic_can_too(tmp_path: Path) -> None:
    """A critic whose attention has a window would see other tokens in a shared row."""
    folder, tokenizer = str(tmp_path / "windowed"), load_tokenizer(f"random:{LLAMA}")
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    critic = MistralForCausalLM(MistralConfig(**shape, **heads, sliding_window=3))
    save_model(critic, tokenizer, Path(folder))
    for source, shares in ((folder, False), (f"random:{LLAMA}", True)):
        advantage = {"kind": "gae", "critic": {"kind": "model", "source": source}}
        session = open_session(make_config(LLAMA, advantage=advantage))
        assert session.shares_prompts == shares
        assert session._planner.share == shares


# ---------------------------------------------------------------- the passes over a batch


def test_an_early_stop_ends_the_passes() -> None:
    """[26] a pass whose mean KL per token is beyond target_kl is the last one."""

    def learn(epochs: int, target: float | None) -> dict[str, float]:
        config = make_config(LLAMA, {"learning_rate": 1e-2}, epochs=epochs, target_kl=target)
        return open_session(config).ppo.step(rollouts(LLAMA), 0)

    second = 2 * learn(2, None)["policy/approx_kl"]  # a mean over both passes; the first one's is 0
    assert second > 1e-3
    results = [learn(4, target) for target in (0.9 * second, 1.1 * second, 1e9)]
    assert [one["optimiser/updates"] for one in results] == [2, 3, 4]
    assert [one["optimiser/stopped_early"] for one in results] == [1, 1, 0]


def test_minibatches_keep_questions_whole_and_are_shuffled_by_the_step() -> None:
    """Every rationale once in each pass; a question's go together where their number allows."""
    session = open_session(make_config(LLAMA, epochs=2, minibatches=3))
    scored = rollouts(LLAMA, questions=[(2, (3, 3)), (5, (3, 3)), (9, (3, 3))])
    experience = session.ppo._maker.make(scored, torch.zeros(6), 0.0)
    orders = set()
    for step in range(4):
        minibatches = session.ppo._minibatches(experience, step)
        assert minibatches == session.ppo._minibatches(experience, step), "a resume repeats it"
        passes = minibatches[:3], minibatches[3:]
        for one in passes:
            assert sorted(map(tuple, one)) == [(0, 1), (2, 3), (4, 5)]
            orders.add(tuple(map(tuple, one)))
    assert len(orders) > 2


def test_minibatches_differ_in_size_by_one_at_most() -> None:
    assert split_evenly([4, 2, 0, 1, 3], 2) == [[4, 2, 0], [1, 3]]
    assert split_evenly([1, 0], 3) == [[1], [0]]


def test_a_session_to_distil_has_no_ppo_and_no_critic() -> None:
    session = open_session(make_config(LLAMA), "distill")
    assert session.policy.critic is None
    assert session._reference is None
    with pytest.raises(RuntimeError, match="no reference model"):
        _ = session.ppo


def test_the_tokenizers_of_the_counting_models_agree() -> None:
    """On which the test of critics above rests."""
    one, other = (load_tokenizer(f"random:{kind}").get_vocab() for kind in (LLAMA, "counting-t5"))
    assert one == other
