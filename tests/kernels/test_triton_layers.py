"""Layers whose kernels are Triton's, in Triton's interpreter on the CPU, each in a process that it is on in."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

import batchnorm as bn
from batchnorm.kernels import choice

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not choice.built(), reason="installed without native kernels"),
]

START = """
import copy, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
import batchnorm as bn
torch.manual_seed(0)
"""


def interpreted(code: str) -> None:
    """Run `code` where the interpreter is on before Triton is imported."""
    ended = subprocess.run(
        [sys.executable, "-c", START + code],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]


@pytest.mark.slow
def test_a_network_trains_as_with_the_native_kernels() -> None:
    """And with bn.save_memory to the bit, as without it."""
    interpreted(
        """
plain = nn.Sequential(
    nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 4, 3),
    bn.BatchNorm2d(4, activation="silu", statistics=bn.Ghost(2)), nn.Conv2d(4, 2, 1),
)
x = torch.randn(4, 3, 9, 9)
found = []
for kernels, saving in (("native", False), ("triton", False), ("triton", True)):
    model = copy.deepcopy(plain)
    if saving:
        bn.save_memory(model)
    with bn.kernels.use(kernels):
        for _ in range(2):
            model(x).square().mean().backward()
        model.eval()
        model(x).sum().backward()
    assert model[1].num_batches_tracked == 2
    found.append([*(p.grad for p in model.parameters()), *model.buffers()])
for native, triton, saved in zip(*found, strict=True):
    torch.testing.assert_close(native, triton, rtol=1e-4, atol=1e-5)
    assert torch.equal(triton, saved)
"""
    )


@pytest.mark.slow
def test_gradients_of_gradients_and_a_bad_batch() -> None:
    interpreted(
        """
with bn.kernels.use("triton"):
    layer = bn.BatchNorm1d(2, activation="relu", dtype=torch.float64)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)
    layer = bn.BatchNorm1d(3)
    layer(torch.randn(6, 3))
    before = copy.deepcopy(layer.state_dict())
    bad = torch.randn(6, 3)
    bad[1, 2] = float("inf")
    layer(bad)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert layer.num_batches_skipped == 1
"""
    )


@pytest.mark.slow
def test_steps_with_something_in_between() -> None:
    """Sync, in a group of one, Renorm and masks, whose moments are taken apart from the output."""
    interpreted(
        """
import tempfile
import torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
x = torch.randn(4, 3, 6)
lengths = torch.tensor([6, 2, 3, 5])
for statistics, mask in ((bn.Sync(), None), (bn.Renorm(), None), (None, lengths), (bn.Ghost(2), None)):
    layer = bn.BatchNorm1d(3, activation="relu", statistics=statistics)
    found = []
    for kernels in ("native", "triton"):
        each, given = copy.deepcopy(layer), x.clone().requires_grad_()
        with bn.kernels.use(kernels):
            y = each(given, given * 2, mask=mask)
            y.square().sum().backward()
            moments = bn.functional.moments(x)
        found.append([y, given.grad, each.weight.grad, each.bias.grad, moments.mean, moments.m2, *each.buffers()])
    for native, triton in zip(*found, strict=True):
        torch.testing.assert_close(native, triton, rtol=1e-4, atol=1e-5)
"""
    )


def test_a_tensor_on_the_cpu_is_the_native_kernels() -> None:
    x = torch.randn(4, 3, 5, 5)
    with bn.kernels.use("triton"):
        assert bn.kernels.active() == "triton"
        assert bn.kernels.instruction_set()
        found = bn.batch_norm(x, None, None, training=True)
    with bn.kernels.use("native"):
        assert torch.equal(found, bn.batch_norm(x, None, None, training=True))


def test_where_there_is_no_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="there is no Triton here"):
        bn.kernels.use("triton")
    assert bn.kernels.active() == "native"
