"""Optimizers and schedules by torch's names: the rates are torch's, and a resumed run has the same bits."""

import itertools

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.optim import lr_scheduler

from batchnorm.training import toml
from batchnorm.training.checkpoint import CheckpointError
from batchnorm.training.optimizer import factor, schedule
from batchnorm.training.trainer import Trainer
from tests.mutations.mutation import Mutation
from tests.training.tiny import TINY, same

ADAMW = (
    "optimizer.name=AdamW",
    "optimizer.schedule=CosineAnnealingLR",
    "optimizer.warmup=2",
    "optimizer.rate=1e-3",
)


def trainer(*changes):
    AcceleratorState._reset_state(True)
    return Trainer(toml.parse(TINY, changes), "job")


def settings(**values):
    return toml.parse({"training": {"steps": 40}, "optimizer": values}).optimizer


def rates(scheduler, optimizer, steps):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def sgd():
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR"])
def test_the_rates_are_those_of_torch_s_classes(name, warmup):
    steps, own, theirs = 40, sgd(), sgd()
    values = {"rate": 0.1, "schedule": name, "warmup": warmup}
    if name == "StepLR":
        values |= {"decay": 0.5, "decay_every": 5}
    main: lr_scheduler.LRScheduler = (
        lr_scheduler.StepLR(theirs, 5, 0.5)
        if name == "StepLR"
        else lr_scheduler.CosineAnnealingLR(theirs, T_max=steps - warmup)
    )
    if warmup:
        linear = lr_scheduler.LinearLR(theirs, 1 / (warmup + 1), total_iters=warmup)
        main = lr_scheduler.SequentialLR(theirs, [linear, main], milestones=[warmup])
    found = rates(schedule(own, settings(**values), steps), own, steps)
    assert found == pytest.approx(rates(main, theirs, steps), rel=1e-9, abs=1e-12)
    assert found == pytest.approx([0.1 * factor(settings(**values), steps, step) for step in range(steps)])


def test_a_warmup_may_take_all_steps_but_the_last():
    found = [factor(settings(schedule="CosineAnnealingLR", warmup=39), 40, step) for step in (0, 38, 39, 40)]
    assert found == pytest.approx([1 / 40, 39 / 40, 1, 0])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [ADAMW, ("training.label_smoothing=0.1", "optimizer.warmup=3")])
def test_a_resumed_run_has_the_same_bits(changes):
    whole = trainer(*changes)
    assert [*whole.run()]
    first = trainer(*changes)
    for _ in itertools.islice(first.run(), 4):
        pass
    second = trainer(*changes)
    second.load_state_dict(first.state_dict())
    assert [*second.run()]
    ends = [
        {name: value for name, value in each.state_dict().items() if name not in ("seconds", "result")}
        for each in (whole, second)
    ]
    assert same(*ends)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("exp_avg", lambda values: values[:1], "exp_avg is no tensor"),
        ("exp_avg_sq", lambda values: values.double(), "exp_avg_sq is no tensor"),
        ("step", lambda step: step + 1e6, "step is "),
        ("step", lambda step: 3, "step is "),
    ],
)
def test_an_impossible_state_of_adamw_is_refused(name, value, says):
    first = trainer(*ADAMW)
    for _ in itertools.islice(first.run(), 2):
        pass
    state = first.state_dict()
    moments = state["optimizer"]["state"][0]
    moments[name] = value(moments[name])
    with pytest.raises(CheckpointError, match=says):
        trainer(*ADAMW).load_state_dict(state)


@pytest.mark.slow
def test_the_loss_is_torch_s_with_label_smoothing():
    each = trainer("training.label_smoothing=0.2")
    logits, labels = torch.randn(5, 10), torch.arange(5)
    expected = torch.nn.CrossEntropyLoss(label_smoothing=0.2)(logits, labels)
    assert torch.equal(each._loss(logits, labels), expected)
    both = each._loss((logits, 2 * logits), labels)  # an auxiliary head's too
    torch.testing.assert_close(
        both, expected + 0.3 * torch.nn.CrossEntropyLoss(label_smoothing=0.2)(2 * logits, labels)
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("optimizer.name=AdamW", "optimizer.momentum=0.8"), "momentum is SGD's"),
        (("optimizer.betas=[0.8, 0.9]",), "betas is AdamW's"),
        (("optimizer.schedule=CosineAnnealingLR", "optimizer.decay=0.5"), "decay is StepLR's"),
        (("optimizer.name=Adam",), "'SGD' or 'AdamW'"),
        (("optimizer.warmup=1",), "a run of training.steps = 1 would end before it"),
    ],
)
def test_what_another_would_use_is_no_setting_of_this_one(changes, says):
    with pytest.raises(toml.ConfigError, match=says):
        toml.parse({"training": {"steps": 1}}, changes)


MUTATIONS = [
    Mutation(
        "a warm-up that ends a step late", "training/optimizer.py",
        "return (step + 1) / (settings.warmup + 1)", "return step / (settings.warmup + 1)",
        "the first step would have a rate of 0",
    ),
]  # fmt: skip
