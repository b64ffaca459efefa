"""What can be run on a GPU alone; where there is none, all of this is skipped. The kernels' tests are in kernels/."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn
from batchnorm.graph.activation_memory import peak_bytes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def network(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), bn.BatchNorm2d(16, activation="relu", **options),
        nn.Conv2d(16, 16, 3, padding=1), bn.BatchNorm2d(16, activation="relu", **options), nn.Conv2d(16, 4, 1),
    )  # fmt: skip


def trained(model: nn.Module, x: torch.Tensor, kernels: Any) -> list[torch.Tensor]:
    with bn.kernels.use(kernels):
        for _ in range(2):
            model(x).square().mean().backward()
    return [*(each.grad for each in model.parameters() if each.grad is not None), *model.buffers()]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(
    "options", [{}, {"debiased": True}, {"statistics": bn.Ghost(4)}, {"statistics": bn.Renorm()}]
)
def test_a_network_trains_as_on_the_cpu(kernels: str, options: dict[str, Any]) -> None:
    model, x = network(**options), torch.randn(16, 3, 24, 24)
    found = trained(copy.deepcopy(model).cuda(), x.cuda(), kernels)
    for one, other in zip(found, trained(model, x, "native"), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_saved_memory(kernels: Any) -> None:
    plain = network().cuda()
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    x = torch.randn(32, 3, 64, 64, device="cuda")
    peaks = []
    for model in (plain, saved):

        def step(model: nn.Module = model) -> None:
            model(x).square().mean().backward()

        with bn.kernels.use(kernels):
            step()
            model.zero_grad()
            peaks.append(peak_bytes(step, x.device))
    assert peaks[1] < 0.75 * peaks[0]
    for one, other in zip(plain.parameters(), saved.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_sync_over_nccl(kernels: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            x = torch.randn(8, 3, 16, 16, device="cuda")
            found = trained(network(statistics=bn.Sync()).cuda(), x, kernels)
            expected = trained(network().cuda(), x, kernels)
        finally:
            dist.destroy_process_group()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_virtual_batch() -> None:
    model, x = network().cuda(), torch.randn(12, 3, 16, 16, device="cuda")
    whole = copy.deepcopy(model)
    parts = x.split(4)
    with bn.virtual_batch(model, parts):
        for part in parts:
            (model(part).square().sum() / len(x)).backward()
    (whole(x).square().sum() / len(x)).backward()
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_a_training(tmp_path: Any) -> None:
    from batchnorm.training import toml
    from batchnorm.training.trainer import Trainer
    from tests.training.tiny import TINY

    machine = {"device": "auto", "save_memory": True}
    losses = [
        record.loss for record in Trainer(toml.parse(TINY | {"machine": machine}, []), "job").run() if record
    ]
    assert losses and all(loss is not None and loss == loss for loss in losses)
