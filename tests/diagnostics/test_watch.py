"""`watch`: what happens in the steps of a training, and nothing of it is changed."""

import copy
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import batchnorm as bn
from tests.diagnostics.networks import Own, healthy
from tests.diagnostics.test_checks import serious


def train(model, data, optimizer, doctor=None, lr=1e-4):
    for group in optimizer.param_groups:
        group["lr"] = lr
    for batch in data:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def test_a_healthy_training_and_the_same_numbers():
    results = []
    for watched in (False, True):
        model, data, optimizer = healthy(Own)
        if watched:
            with bn.watch(model, optimizer) as doctor:
                train(model, data, optimizer)
            assert serious(doctor.findings) == [] and doctor.steps.number == 4
            assert doctor.steps.layers["norms.0"].calls == [1, 1, 1, 1]
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
            assert not optimizer._optimizer_step_post_hooks
        else:
            train(model, data, optimizer)
        results.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(results[0][key], value) for key, value in results[1].items())


def test_hooks_go_after_an_error():
    model, data, optimizer = healthy(Own)
    model.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), bn.watch(model, optimizer):
        model(data[0])
    model.head._forward_hooks.clear()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_twice_and_ours_once(reentrant):
    class Checkpointed(Own):
        def forward(self, x):
            x = self.stem(x)
            for conv, norm in zip(self.convs, self.norms, strict=True):
                block = nn.Sequential(conv, norm)
                x = x + torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant).relu()
            return self.head(x.mean((2, 3)))

    model, data, optimizer = healthy(Checkpointed)
    with bn.watch(model, optimizer) as doctor:
        train(model, data, optimizer)
    assert serious(doctor.findings) == [("BN303", "norms.0"), ("BN303", "norms.1")]
    assert serious(bn.examine(model, data, optimizer, select=["BN303"])) == serious(doctor.findings)
    model, _ = bn.upgrade(healthy(Checkpointed)[0])
    with bn.watch(model) as doctor:
        train(model, data, torch.optim.SGD(model.parameters(), lr=0.1))
    assert serious(doctor.findings) == [] and doctor.steps.number == 4


def test_two_networks_of_a_gan():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
    )
    optimizer = torch.optim.SGD(bn.param_groups(model, 1e-4), lr=1e-4)
    with bn.watch(model, optimizer) as doctor:
        for _ in range(4):
            real, made = torch.randn(16, 3, 16, 16) + 1, torch.rand(16, 3, 16, 16) / 10
            (model(real).square().mean() + model(made).square().mean()).backward()
            optimizer.step()
    assert ("BN307", "1") in serious(doctor.findings)
    assert "BN308" not in {code for code, _ in serious(doctor.findings)}


def test_weights_that_change_are_not_batches_that_differ():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with bn.watch(model, optimizer) as doctor:
        for _ in range(20):
            optimizer.zero_grad()
            x = torch.randn(16, 30)
            nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
            optimizer.step()
    assert serious(doctor.findings) == []


def test_validation_in_training_mode():
    model, data, optimizer = healthy(Own)
    with bn.watch(model, optimizer) as doctor:
        train(model, data, optimizer)
        with torch.no_grad():
            model(data[0])
    assert serious(doctor.findings) == [("BN306", "")]
    with bn.watch(model, optimizer) as doctor:
        train(model, data, optimizer)
        with torch.no_grad():
            model.eval()(data[0])
            model.train()
    assert serious(doctor.findings) == []


def test_one_part_in_evaluation_mode():
    model, data, optimizer = healthy(Own)
    model.norms[0].eval()
    with bn.watch(model, optimizer) as doctor:
        train(model, data, optimizer)
    assert serious(doctor.findings) == [("BN204", "norms.0")]  # which explains that it was called so
    model.stem.eval(), model.norms.eval()
    bn.freeze(model)
    with bn.watch(model, optimizer) as doctor:
        train(model, data, optimizer)
    assert serious(doctor.findings) == []


@pytest.mark.parametrize(("parts", "found"), [(8, [("BN308", "")]), (1, [])])
def test_accumulation(parts, found):
    model, data, optimizer = healthy(Own)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    with bn.watch(model, optimizer) as doctor:
        for batch in data:
            optimizer.zero_grad()
            for part in batch.chunk(parts):
                model(part).square().mean().backward()
            optimizer.step()
    assert serious(doctor.findings) == found


def test_data_of_the_steps_are_looked_at():
    model, data, optimizer = healthy(Own)
    data[2][3] = float("inf")
    with torch.no_grad():
        model.convs[1].weight[5] = 0
    with bn.watch(model, optimizer) as doctor:
        for batch in data:
            model(batch)
            optimizer.step()
    found = serious(doctor.findings)
    assert ("BN408", "stem.1") in found and ("BN406", "norms.1") in found
    assert {code for code, _ in found} == {"BN408", "BN406", "BN202"}  # torch's statistics keep the nan


def test_start_and_stop_in_place_of_a_block():
    model, data, optimizer = healthy(Own)
    doctor = bn.watch(model, optimizer)
    doctor.start()
    doctor.start()
    train(model, data[:2], optimizer)
    doctor.stop()
    with torch.no_grad():
        model(data[0])  # not watched
    doctor.start()
    train(model, data[2:], optimizer)
    doctor.stop()
    doctor.stop()
    assert doctor.steps.number == 4 and serious(doctor.findings) == []


def test_compiled_models_run_uncompiled_meanwhile():
    model, data, _ = healthy(Own)
    wrapped: Any = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    wrapped(data[0])
    with bn.watch(wrapped, optimizer) as doctor:
        train(wrapped, data, optimizer)
    assert doctor.steps.layers["_orig_mod.norms.1"].training == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_in_lightning(tmp_path):
    lightning: Any = pytest.importorskip("lightning.pytorch")
    torch.manual_seed(0)

    class Task(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self):
            super().__init__()
            self.net = healthy(Own)[0]
            self.seen = []

        def training_step(self, batch, _):
            self.net.eval()  # the bug
            return self.net(batch[0]).square().mean()

        def validation_step(self, batch, _):
            self.net(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    task = Task()
    doctor = bn.watch(task)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(64, 3, 32, 32)), batch_size=16
    )
    trainer = lightning.Trainer(
        max_epochs=2,
        callbacks=[doctor.lightning_callback()],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(task, data, data)
    assert serious(doctor.findings) == [("BN305", "")]
    assert doctor.steps.number == 8 and doctor.steps.layers["net.norms.0"].without_gradient == 0
    assert not any(module._forward_hooks for module in task.modules())
