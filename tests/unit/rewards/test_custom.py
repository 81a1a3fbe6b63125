"""Rewards of the user's own, in a module that lies beside the run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lmcot.config import CustomReward, GuidanceRewards
from lmcot.errors import UserError
from lmcot.records import Answer, Example, Failure, FailureKind, Judgement, Rollout
from lmcot.rewards.custom import load_custom, load_customs, with_custom

Module = Callable[[str], str]
"""Writes a module and gives its name."""

EXAMPLE = Example("q7", "Which river?", "Humboldt River", ())
ROLLOUT = Rollout("u", "q7", 0, (1,), (2, 3), (-0.5, -0.5), "eos", "It is the Humboldt.", 0)
JUDGED = Judgement({"em": 1.0, "f1": 0.5}, Answer("Humboldt", "Humboldt", 9, 1), True)

_numbers = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> str:
        name = f"own_reward_{next(_numbers)}"  # Python remembers what it imported by name
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def judged(name: str, judgement: Judgement = JUDGED) -> Judgement:
    return with_custom(judgement, EXAMPLE, ROLLOUT, load_customs(GuidanceRewards(custom=name)))


def returning(module: Module, value: str) -> str:
    name = module(f"def reward(example, rollout, judgement):\n    return {value}\n")
    return f"{name}:reward"


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("len(rollout.response_ids)", 2.0),
        ("judgement.components['f1'] - 1", -0.5),
        ("judgement.answer.extracted in example.answer", 1.0),
        ("judgement.contains_gold", 1.0),
        ("__import__('numpy').float32(0.25)", 0.25),
        ("__import__('fractions').Fraction(1, 4)", 0.25),
    ],
)
def test_the_value_is_a_component(module: Module, value: str, number: float) -> None:
    found = judged(returning(module, value))
    assert found == Judgement({**JUDGED.components, "custom": number}, JUDGED.answer, True)
    assert isinstance(found.components["custom"], float)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("None", "None"),
        ("float('nan')", "nan"),
        ("float('inf')", "inf"),
        ("10 ** 400", "1000"),
        ("'0.5'", "'0.5'"),
        ("1j", "1j"),
        ("[1.0]", "[1.0]"),
    ],
)
def test_what_is_no_finite_number_fails_the_judgement(
    module: Module, value: str, named: str
) -> None:
    """[16] It never becomes a reward."""
    name = returning(module, value)
    failure = judged(name).failure
    assert failure is not None
    assert failure.kind is FailureKind.PERMANENT
    assert f"the custom reward '{name}' is {named}" in failure.reason
    assert len(failure.reason) < 200
    assert not judged(name).components


def test_a_failed_judgement_is_not_shown_to_it(module: Module) -> None:
    name = returning(module, "1 / 0")
    failed = Judgement(failure=Failure(FailureKind.TRANSIENT, "the endpoint hangs"))
    assert judged(name, failed) is failed


def test_what_it_raises_is_the_users_to_fix(module: Module) -> None:
    name = returning(module, "judgement.components['bleu']")
    with pytest.raises(UserError, match=rf"'{name}' raised KeyError: 'bleu' .* 'q7'"):
        judged(name)


def test_it_cannot_alter_the_other_components(module: Module) -> None:
    found = judged(returning(module, "judgement.components.update(em=9.0) or 1"))
    assert found.components == {"em": 1.0, "f1": 0.5, "custom": 1.0}
    assert JUDGED.components == {"em": 1.0, "f1": 0.5}


def test_several_rewards_are_a_component_each(module: Module) -> None:
    """Each sees the judgement as it was before any of them."""
    name = module(
        "def length(example, rollout, judgement): return len(rollout.response_ids)\n"
        "def count(example, rollout, judgement): return len(judgement.components)\n"
        "def none(example, rollout, judgement): return None\n"
    )
    several = {one: CustomReward(function=f"{name}:{one}") for one in ("length", "count")}
    found = with_custom(JUDGED, EXAMPLE, ROLLOUT, load_customs(GuidanceRewards(custom=several)))
    assert found.components == {**JUDGED.components, "custom/length": 2.0, "custom/count": 2.0}
    several["none"] = CustomReward(function=f"{name}:none")
    lost = with_custom(JUDGED, EXAMPLE, ROLLOUT, load_customs(GuidanceRewards(custom=several)))
    assert lost.failure is not None
    assert f"'{name}:none' is None" in lost.failure.reason


def test_anything_that_takes_three_arguments_will_do(module: Module) -> None:
    name = module(
        "class Reward:\n"
        "    def __call__(self, example, rollout, judgement, scale=2.0):\n"
        "        return scale\n"
        "reward = Reward()\n"
        "def any_number(*all): return 3\n"
    )
    assert judged(f"{name}:reward").components["custom"] == 2.0
    assert judged(f"{name}:any_number").components["custom"] == 3.0


@pytest.mark.parametrize(
    ("text", "function", "reason"),
    [
        ("", "reward", "has no function 'reward'"),
        ("reward = 1.0", "reward", "has no function 'reward'"),
        (
            "def reward(example, rollout): ...",
            "reward",
            "three arguments: define it as def reward\\(",
        ),
        ("def reward(a, b, c, *, d): ...", "reward", "three arguments"),
        ("import no_such_package", "reward", r"No module named 'no_such_package'\): install it"),
        ("def reward(", "reward", r"SyntaxError: .*: fix it"),
        ("raise RuntimeError('no GPU')", "reward", r"RuntimeError: no GPU\): fix it"),
    ],
)
def test_what_cannot_be_used_is_refused(
    module: Module, text: str, function: str, reason: str
) -> None:
    name = f"{module(text)}:{function}"
    with pytest.raises(UserError, match=f"^rewards.custom is '{name}', but .*{reason}") as caught:
        load_custom(name)
    assert "\n" not in str(caught.value)


def test_a_missing_module_is_named_with_what_to_do() -> None:
    expected = "install it or put its folder on PYTHONPATH"
    with pytest.raises(UserError, match=f"'no_such.rewards' .*{re.escape(expected)}"):
        load_custom("no_such.rewards:reward")
