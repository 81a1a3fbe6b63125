"""A reward of the user's own: a function in a module of theirs, named ``module:function``."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from typing import Protocol, cast

from lmcot.errors import UserError
from lmcot.records import Example, Failure, FailureKind, Judgement, Rollout

COMPONENT = "custom"
"""The name of its component in a judgement."""


class CustomReward(Protocol):
    """What the user writes: ``def reward(example, rollout, judgement) -> float``.

    The judgement holds the other components, the frozen LM's answer and ``contains_gold``.
    """

    def __call__(self, example: Example, rollout: Rollout, judgement: Judgement, /) -> float:
        """The reward of one rationale: a finite number, the larger the better."""
        ...


def load_custom(name: str) -> CustomReward:
    """The function that ``module:function`` names.

    Raises:
        UserError: if the module cannot be imported, has no such function, or the function does
            not take three positional arguments.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        missing = isinstance(error, ModuleNotFoundError)
        remedy = "install it or put its folder on PYTHONPATH" if missing else "mend it"
        raise UserError(
            f"rewards.custom is '{name}', but the module '{module_name}' cannot be imported "
            f"({type(error).__name__}: {error}): {remedy}"
        ) from error
    reward = getattr(module, function_name, None)
    if not callable(reward):
        raise UserError(
            f"rewards.custom is '{name}', but the module '{module_name}' has no function "
            f"'{function_name}': define it there, or name another"
        )
    if not _takes_three(reward):
        raise UserError(
            f"rewards.custom is '{name}', but it cannot be called with three arguments: define it "
            f"as def {function_name}(example, rollout, judgement)"
        )
    return cast(CustomReward, reward)


def with_custom(
    judgement: Judgement, example: Example, rollout: Rollout, *, name: str, reward: CustomReward
) -> Judgement:
    """The judgement with the component ``custom``; a failed judgement as it is.

    A value that is no finite real number makes it a permanent failure.

    Raises:
        UserError: if the user's function raises, which is theirs to mend.
    """
    if judgement.failure is not None:
        return judgement
    # A copy: what the function does to it must not reach the other components.
    shown = replace(judgement, components=dict(judgement.components))
    try:
        value = reward(example, rollout, shown)
    except Exception as error:
        raise UserError(
            f"the custom reward '{name}' raised {type(error).__name__}: {error} for the question "
            f"'{example.id}': mend the function"
        ) from error
    number = _finite(value)
    if number is None:
        reason = f"the custom reward '{name}' is {value!r:.100}, not a finite number"
        return Judgement(failure=Failure(FailureKind.PERMANENT, reason))
    return replace(judgement, components={**judgement.components, COMPONENT: number})


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
