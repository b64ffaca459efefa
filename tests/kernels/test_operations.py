"""How many operations of torch's a layer takes where none of our kernels runs, as on a GPU; and what they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm as bn
from batchnorm.kernels import choice, fused_operators, reference
from batchnorm.kernels.call import Call
from batchnorm.moments import Moments
from tests.mutations.mutation import Mutation

MUTATIONS = [
    Mutation(
        "torch's variance taken for m2",
        "kernels/call.py",
        "(count, mean.to(wide), variance.to(wide) * (count - 1))",
        "(count, mean.to(wide), variance.to(wide))",
        why="m2 is count - 1 times the unbiased variance",
    ),
    Mutation(
        "the fused step is made of a bad batch too",
        "kernels/fused_operators.py",
        "found_inf=flag,",
        "found_inf=None,",
        why="one batch makes the running statistics of a layer on a GPU nan for good",
    ),
    Mutation(
        "skipped batches are counted as tracked",
        "kernels/fused_operators.py",
        "entered, skipped = flag.eq(levels).unbind()",
        "skipped, entered = flag.eq(levels).unbind()",
        why="the counters say the reverse of what happened",
    ),
]

X = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def of(layer: nn.Module, x: Tensor) -> list[str]:
    layer(x)  # whatever is made once
    with Operations() as seen:
        layer(x)
    return list(seen.names)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_with_torch_s_operators_two_more_than_torch_s_layer(training: bool, gradients: bool) -> None:
    x = X.clone().requires_grad_(gradients)
    ours, theirs = bn.BatchNorm2d(4).train(training), nn.BatchNorm2d(4).train(training)
    with bn.kernels.use("torch"):
        assert len(of(ours, x)) <= len(of(theirs, x)) + 2, of(ours, x)


def test_elsewhere_six_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nothing of ours moves the running statistics; views and `empty` launch nothing."""
    monkeypatch.setattr(choice, "built", lambda: False)
    with bn.kernels.use("torch"):
        found = of(bn.BatchNorm2d(4), X)
    launching = [name for name in found if not any(each in name for each in ("empty", "unbind", "split"))]
    assert len(launching) <= 6, launching


@pytest.mark.parametrize("bad", [None, float("inf"), float("nan"), 1e30])
@pytest.mark.parametrize("path", ["native", "fused"])
def test_running_statistics_and_counters(
    path: str, bad: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "fused":
        monkeypatch.setattr(choice, "built", lambda: False)
    x = X.clone()
    if bad is not None:
        x[1, 2, 3, 4] = bad
    ours, theirs = bn.BatchNorm2d(4), bn.BatchNorm2d(4)
    for layer, kernels in ((ours, "torch"), (theirs, "reference")):
        with bn.kernels.use(kernels):  # type: ignore[arg-type]
            layer(X + 1)
            if bad is None or (path == "fused" and layer is ours):
                layer(x)
            else:
                with pytest.warns(RuntimeWarning, match="inf or nan"):
                    layer(x)
            layer(X - 1)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert ours.num_batches_skipped == theirs.num_batches_skipped == (bad is not None)
    if bad is not None and path == "fused":  # as on a GPU, where asking would wait for it
        with pytest.warns(RuntimeWarning, match="inf or nan"):
            ours.eval()


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, None])
@pytest.mark.parametrize("built", [True, False])
def test_every_rate(built: bool, momentum: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fused step cannot do is done by the moments."""
    monkeypatch.setattr(choice, "built", lambda: built)
    layers = [bn.BatchNorm2d(4, momentum=momentum, debiased=momentum == 0.1) for _ in range(2)]
    for layer, kernels in zip(layers, ("torch", "reference"), strict=True):
        with bn.kernels.use(kernels):  # type: ignore[arg-type]
            for shift in (1, 3):
                layer(X * shift + shift)
    for name, value in layers[1].state_dict().items():
        torch.testing.assert_close(layers[0].state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.49, 0.5, 1.0, torch.tensor(0.25, dtype=torch.float64)])
def test_the_fused_step_is_the_average_or_leaves_it_to_others(rate: Any) -> None:
    mean, variance = torch.randn(7) + 100, torch.rand(7)
    fused, plain = (
        Call(True, 1e-5, None, torch.randn(7), torch.ones(7), rate, torch.zeros((), dtype=torch.long))
        for _ in range(2)
    )
    plain.running_mean = fused.running_mean.clone()  # type: ignore[union-attr]
    entered = fused_operators.track(fused, mean.clone(), variance.clone(), torch.zeros(1))
    assert (entered is None) == (not isinstance(rate, float) or rate >= 0.5)
    if entered is not None:
        moments = Moments(10, mean.double(), variance.double() * 9)
        reference.track(moments, plain.running_mean, plain.running_var, rate, plain.batches)  # type: ignore[arg-type]
        torch.testing.assert_close(fused.running_mean, plain.running_mean)
        torch.testing.assert_close(fused.running_var, plain.running_var)
        assert fused.batches == plain.batches == 1


def test_a_trace_sees_every_operation() -> None:
    """make_fx of a training step: the running statistics are moved in the graph, not beside it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = bn.batch_norm(x, mean, var, training=True)
        return y, mean, var

    with bn.kernels.use("torch"):
        graph = make_fx(step)(X, torch.zeros(4), torch.ones(4))
        _, mean, _ = graph(X + 3, torch.zeros(4), torch.ones(4))
    torch.testing.assert_close(mean, 0.1 * (X + 3).mean((0, 2, 3)))
