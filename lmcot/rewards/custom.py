"""Custom rewards: functions in the user's own modules, named ``module:function``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Final, Protocol, cast

from lmcot.config import GuidanceRewards
from lmcot.data.tasks.users_own import load_own
from lmcot.errors import UserError
from lmcot.records import Example, Failure, FailureKind, Judgement, Rollout
from lmcot.rewards.component import Measured


class CustomReward(Protocol):
    """The function that the user writes: ``def reward(example, rollout, judgement) -> float``.

    The judgement holds the other components, the frozen LM's answer and ``contains_gold``.
    """

    def __call__(self, example: Example, rollout: Rollout, judgement: Judgement, /) -> float:
        """The reward of one rationale: a finite number, the larger the better."""
        ...


@dataclass(frozen=True, slots=True)
class AbsentReward:
    """Stands for a function of a program or a notebook that this process was not given.

    An evaluation does not need it.
    """

    name: str
    """The name that the settings call it."""

    def __call__(self, example: Example, rollout: Rollout, judgement: Judgement, /) -> float:
        """Raises `UserError`."""
        raise self.error

    @property
    def error(self) -> UserError:
        """What the user is told."""
        return UserError(
            f"rewards.custom is '{self.name}', a function of a program or a notebook: run the "
            "stage there and give it the function, or move it into a module and name that here"
        )


_NONE_GIVEN: Final[Mapping[str, CustomReward]] = {}


def load_custom(name: str, given: Mapping[str, CustomReward] = _NONE_GIVEN) -> CustomReward:
    """The function that ``module:function`` names.

    Args:
        given: functions of the program that runs the stage, by such names.

    Raises:
        UserError: if the module cannot be imported, has no such function, or the function does
            not take three positional arguments.
    """
    reward = given[name] if name in given else _imported(name)
    if not _takes_three(reward):
        raise UserError(
            f"rewards.custom is '{name}', but it cannot be called with three arguments: define it "
            f"as def {name.partition(':')[2]}(example, rollout, judgement)"
        )
    return cast(CustomReward, reward)


def _imported(name: str) -> Callable[..., object]:
    if name.startswith("__main__:"):
        return AbsentReward(name)
    return load_own("rewards.custom", name, "function")


@dataclass(frozen=True, slots=True)
class Custom:
    """A custom reward, loaded."""

    component: str
    """The name of its component in a judgement."""
    function: str
    """The function's name, as ``module:function``."""
    reward: CustomReward
    """The loaded function."""

    def of(self, judgement: Judgement, example: Example, rollout: Rollout) -> Measured:
        """The reward of one rationale; a value that is not a finite real number is a failure.

        Raises:
            UserError: if the user's function raises an exception.
        """
        # A copy: what the function does to it must not reach the other components.
        shown = replace(judgement, components=dict(judgement.components))
        try:
            value = self.reward(example, rollout, shown)
        except Exception as error:
            raise UserError(
                f"the custom reward '{self.function}' raised {type(error).__name__}: {error} for "
                f"the question '{example.id}': fix the function"
            ) from error
        number = _finite(value)
        if number is not None:
            return number
        reason = f"the custom reward '{self.function}' is {value!r:.100}, not a finite number"
        return Failure(FailureKind.PERMANENT, reason)


def load_customs(
    rewards: GuidanceRewards, given: Mapping[str, CustomReward] = _NONE_GIVEN
) -> list[Custom]:
    """All custom rewards that the settings name. Raises as `load_custom` does."""
    return [
        Custom(component, one.function, load_custom(one.function, given))
        for component, one in rewards.custom_rewards.items()
    ]


def with_custom(
    judgement: Judgement, example: Example, rollout: Rollout, customs: Sequence[Custom]
) -> Judgement:
    """The judgement with a component for each custom reward; a failed judgement as it is.

    Each function sees the judgement without the others' components. One that does not return a
    finite number makes the judgement a failure.

    Raises:
        UserError: if a function raises an exception.
    """
    if judgement.failure is not None:
        return judgement
    added: dict[str, float] = {}
    for custom in customs:
        value = custom.of(judgement, example, rollout)
        if isinstance(value, Failure):
            return Judgement(failure=value)
        added[custom.component] = value
    return replace(judgement, components={**judgement.components, **added})


def _takes_three(reward: Callable[..., object]) -> bool:
    try:
        inspect.signature(reward).bind(None, None, None)
    except TypeError:
        return False
    except ValueError:  # some functions written in C tell nothing of their arguments
        return True
    return True


def _finite(value: object) -> float | None:
    if not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
