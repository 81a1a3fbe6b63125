"""The training engine by itself: AdamW at every ZeRO stage, and what DeepSpeed must not keep."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lmcot.config import LearnerSettings, OptimiserSettings
from lmcot.learner.engine import TrainEngine
from tests.support.learner_cases import masters, set_up_for_tests, whole

pytestmark = pytest.mark.usefixtures("one_thread")


class Layout(NamedTuple):
    stage: Any
    offload: Any = "none"


LAYOUTS = (
    Layout(0),
    Layout(1),
    Layout(1, "optimiser"),
    Layout(2),
    Layout(2, "optimiser"),
    Layout(3),
    Layout(3, "optimiser"),
    Layout(3, "optimiser_and_parameters"),
)
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


class Two(nn.Module):
    """Two parameters in groups of their own; the loss names the gradient of one or both."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(3, 3, generator=generator).to(dtype))
        self.b = nn.Parameter(torch.randn(5, generator=generator).to(dtype))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        parts = [(self.get_parameter(name) * g).sum() for name, g in gradients.items()]
        return torch.stack(parts).sum()


def _open(layout: Layout, dtype: torch.dtype, **optimiser: Any) -> TrainEngine:
    settings = {"learning_rate": 0.125, "max_grad_norm": 1e9, **optimiser}
    module = Two(dtype)
    with set_up_for_tests():
        return TrainEngine(
            module,
            [{"params": [module.a]}, {"params": [module.b], "lr": 2 * settings["learning_rate"]}],
            optimiser=OptimiserSettings(**settings),
            learner=LearnerSettings(zero_stage=layout.stage, offload=layout.offload),
            total_steps=8,
        )


def _add(engine: TrainEngine, gradients: dict[str, Tensor]) -> None:
    """One micro-batch."""
    engine.backward(engine.engine(gradients))


def _masters(engine: TrainEngine) -> dict[str, Tensor]:
    """The optimiser's own parameters by name."""
    shapes = {"a": (3, 3), "b": (5,)}
    return {
        name: tensor.detach().flatten()[: torch.Size(shape).numel()].view(shape).clone()
        for (name, shape), tensor in zip(shapes.items(), masters(engine), strict=True)
    }


def _random(step: int, micro: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + micro)
    found = {
        "a": torch.randn(3, 3, generator=generator).to(dtype),
        "b": torch.randn(5, generator=generator).to(dtype),
    }
    if micro == 1:
        del found["b"]  # not every micro-batch reaches every parameter
    return found


@BOTH
@EVERY_LAYOUT
def test_steps_are_those_of_torch_adamw(layout: Layout, dtype: torch.dtype) -> None:
    """[25] [31] AdamW in float32 on summed gradients, clipped by their global norm, scheduled.

    From the first step on: the schedule begins without a warm-up, and the weights decay. The
    third step leaves one group as it is, to neither its gradient nor its decay; the schedule
    then gives it its rate back ([24]).
    """
    options = {"betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.2}
    engine = _open(layout, dtype, max_grad_norm=5.7, decay="linear", **options)
    plain = Two(dtype).float()
    groups = [{"params": [plain.a]}, {"params": [plain.b], "lr": 0.25}]
    adam = torch.optim.AdamW(groups, lr=0.125, **options)  # type: ignore[arg-type]
    assert torch.equal(_masters(engine)["a"], plain.a), "set up, and nothing has moved"
    # DeepSpeed's norm in bfloat16 at stage 0 is that of the gradients as rounded to it.
    rounding, close = (4e-3, 1e-3) if layout.stage == 0 and dtype != torch.float32 else (1e-5, 2e-6)
    clipped = 0
    for step in range(4):
        total = {"a": torch.zeros(3, 3), "b": torch.zeros(5)}
        for micro in range(3 - step % 2):
            gradients = _random(step, micro, dtype)
            _add(engine, gradients)
            for name, gradient in gradients.items():
                total[name] += gradient.float()
        norm = float(torch.cat([g.flatten() for g in total.values()]).norm())
        scale = min(1.0, 5.7 / norm)
        clipped += scale < 1
        plain.a.grad, plain.b.grad = total["a"] * scale, total["b"] * scale
        for group, rate in zip(adam.param_groups, (0.125, 0.25), strict=True):
            group["lr"] = rate * (1 - step / 8)
        if step == 2:
            adam.param_groups[1]["lr"] = 0.0
        adam.step()
        result = engine.step(frozen_groups=(1,) if step == 2 else ())
        assert result.applied
        assert result.grad_norm == pytest.approx(norm, rel=rounding), "before clipping"
        assert result.learning_rate == pytest.approx(
            (0.125 if step == 2 else 0.25) * (1 - step / 8)
        )
        for name, master in _masters(engine).items():
            torch.testing.assert_close(master, plain.get_parameter(name).data, atol=close, rtol=0)
        for name, parameter in whole(engine, engine.module).items():
            assert torch.equal(parameter, _masters(engine)[name].to(dtype))
    assert 0 < clipped < 4


@EVERY_LAYOUT
def test_gradients_add_up_in_float32(layout: Layout) -> None:
    """[22] one large gradient and tiny ones: bfloat16 has no room for 1 + 2**-10."""
    engine = _open(layout, torch.bfloat16, betas=(0.0, 0.0), eps=1.0)
    before = _masters(engine)["a"]
    for micro in range(16):
        gradient = torch.full((3, 3), 2.0**-10 if micro else 1.0, dtype=torch.bfloat16)
        _add(engine, {"a": gradient})
    total = 1 + 15 * 2**-10
    assert engine.step().grad_norm == pytest.approx(3 * total, rel=1e-6 if layout.stage else 2e-3)
    expected = before - 0.125 * total / (total + 1)
    torch.testing.assert_close(_masters(engine)["a"], expected, atol=1e-6, rtol=0)


WINDOWS = (("ab", "ab"), ("a", "b"), ("a", "a"), ("b", "b"), ("", "a"), ("a", "ab"), ("b", "a"))
"""The parameters that each step's two micro-batches reach."""


@BOTH
@EVERY_LAYOUT
def test_a_parameter_moves_by_its_own_gradients_of_that_step(
    layout: Layout, dtype: torch.dtype
) -> None:
    """[22] each counts once; without one it stays where it is, for Adam here has no memory."""
    engine = _open(layout, dtype, betas=(0.0, 0.0), eps=1.0)
    before = _masters(engine)
    for window in WINDOWS:
        totals = {"a": 0.0, "b": 0.0}
        for names, scale in zip(window, (1.0, 2.0), strict=True):
            if names:
                own = {"a": torch.ones(3, 3, dtype=dtype), "b": torch.ones(5, dtype=dtype)}
                _add(engine, {name: scale * own[name] for name in names})
            for name in names:
                totals[name] += scale
        norm = (9 * totals["a"] ** 2 + 5 * totals["b"] ** 2) ** 0.5
        assert engine.step().grad_norm == pytest.approx(norm, rel=1e-6)
        after = _masters(engine)
        for name, rate in (("a", 0.125), ("b", 0.25)):
            expected = before[name] - rate * totals[name] / (totals[name] + 1)
            torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=0)
        before = after


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3], LAYOUTS[5]], ids=str)
def test_a_skipped_step_gives_a_frozen_group_its_rate_back(layout: Layout) -> None:
    """[24] the schedule, which would, does not move then."""
    engine = _open(layout, torch.float32, betas=(0.0, 0.0), eps=1.0)
    before = _masters(engine)
    _add(engine, {"a": torch.full((3, 3), float("nan")), "b": torch.ones(5)})
    result = engine.step(frozen_groups=(1,))
    assert (result.applied, result.grad_norm) == (False, float("inf"))
    assert all(torch.equal(before[name], now) for name, now in _masters(engine).items())
    _add(engine, {"a": torch.ones(3, 3), "b": torch.ones(5)})
    result = engine.step()
    assert (result.applied, result.learning_rate) == (True, 0.25)
    assert result.grad_norm == pytest.approx(14**0.5)
    for name, rate in (("a", 0.125), ("b", 0.25)):
        torch.testing.assert_close(_masters(engine)[name], before[name] - rate / 2)


def test_a_step_without_a_gradient_is_a_mistake() -> None:
    engine = _open(Layout(0), torch.float32)
    with pytest.raises(RuntimeError, match="no gradient to step with"):
        engine.step()
    _add(engine, _random(0, 0, torch.float32))
    engine.step()
    with pytest.raises(RuntimeError, match="no gradient to step with"):
        engine.step()
