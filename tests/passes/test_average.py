"""`bn.average` against torch's AveragedModel where that is right, and against the law of total variance."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import batchnorm as bn
from tests.mutations.mutation import Mutation


def average(*arguments: Any, **named: Any) -> Any:
    return bn.average(*arguments, **named)


def model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), bn.BatchNorm2d(4), nn.Flatten()
    )


def trained(net, averages, steps=7):
    """Each state after a step."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    states = []
    for step in range(steps):
        x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step)) * (step + 1)
        net.train()(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for each in averages:
            each.update_parameters(net)
        states.append(copy.deepcopy(net.state_dict()))
    return states


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.0, 1.0, None])
def test_copied_statistics_are_torch_s(decay):
    net = model()
    theirs = AveragedModel(net, multi_avg_fn=None if decay is None else get_ema_multi_avg_fn(decay))
    ours = average(net, decay)
    trained(net, [theirs, ours])
    assert ours.n_averaged == theirs.n_averaged == 7
    # AveragedModel copies buffers too: there it is right
    for key, value in theirs.module.state_dict().items():
        torch.testing.assert_close(ours.module.state_dict()[key], value, rtol=1e-6, atol=1e-7)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(ours(x), theirs.eval()(x))


@pytest.mark.parametrize("decay", [0.8, None])
def test_averaged_statistics_are_those_of_the_mixture(decay):
    net = model()
    ours = average(net, decay, statistics="averaged")
    states = trained(net, [ours])
    weights = [1.0]
    for number in range(1, len(states)):
        share = 1 / (number + 1) if decay is None else 1 - decay
        weights = [each * (1 - share) for each in weights] + [share]
    for layer in ("1", "4"):
        means = [s[f"{layer}.running_mean"].double() for s in states]
        variances = [s[f"{layer}.running_var"].double() for s in states]
        mean = torch.stack([w * m for w, m in zip(weights, means, strict=True)]).sum(0)
        second = torch.stack([w * (v + m**2) for w, m, v in zip(weights, means, variances, strict=True)]).sum(
            0
        )
        state = ours.module.state_dict()
        torch.testing.assert_close(state[f"{layer}.running_mean"].double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            state[f"{layer}.running_var"].double(), second - mean**2, rtol=1e-5, atol=1e-6
        )
        assert state[f"{layer}.num_batches_tracked"] == 7


def test_measured_statistics_are_those_of_the_averaged_weights():
    net = model()
    ours = average(net, 0.9, statistics="measured")
    x = torch.randn(2, 3, 6, 6)
    ours(x)  # nothing has been averaged yet
    trained(net, [ours])
    with pytest.raises(RuntimeError, match=r"call measure\(batches\) first"):
        ours(x)
    data = torch.randn(256, 3, 6, 6)
    report = ours.measure(data.split(64), estimator="pooled")
    assert report.count("measured") == 2
    values = ours.module[0](data)
    torch.testing.assert_close(ours.module[1].running_mean, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.module[1].running_var, values.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    ours(x)
    ours.update_parameters(net)
    again = average(net, 0.9, statistics="measured")
    again.load_state_dict(ours.state_dict())
    with pytest.raises(RuntimeError, match="measured"):
        again(x)


def test_a_small_share_is_not_lost_in_bfloat16():
    net = nn.Linear(4, 4, bias=False).bfloat16()
    nn.init.ones_(net.weight)
    ours = average(net, 0.999)
    theirs: Any = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    for each in (ours, theirs):
        each.update_parameters(net)
    nn.init.constant_(net.weight, 2.0)
    for _ in range(1000):
        for each in (ours, theirs):
            each.update_parameters(net)
    assert bool((theirs.module.weight == 1).all())  # 1 + 0.001 is 1 in bfloat16
    assert abs(ours.module.weight.float().mean() - (2 - 0.999**1000)) < 0.01
    assert ours.module.weight.dtype == torch.bfloat16


def test_a_decay_that_grows():
    net = nn.Linear(1, 1, bias=False)
    ours = average(net, lambda number: min(0.999, (1 + number) / (10 + number)))
    values: list[float] = []
    for number in range(5):
        nn.init.constant_(net.weight, float(number))
        ours.update_parameters(net)
        decay = 0.0 if number == 0 else (1 + number) / (10 + number)
        values.append(decay * (values[-1] if values else 0.0) + (1 - decay) * number)
    assert ours.module.weight.item() == pytest.approx(values[-1])


def test_wrapped_compiled_and_shared_models():
    net = model()
    net[3].weight = nn.Parameter(net[3].weight.detach())
    tied: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    pairs: list[Any] = [
        (net, nn.DataParallel(net)),
        (net, torch.compile(net, backend="eager")),
        (tied, tied),
    ]
    for inner, wrapped in pairs:
        ours = average(wrapped, 0.5)
        ours.update_parameters(wrapped)
        ours.update_parameters(inner)
        assert ours.module.state_dict().keys() == inner.state_dict().keys()
    assert ours.module[1].weight is ours.module[0].weight


def test_another_model_is_refused():
    ours = average(model(), 0.9)
    before = copy.deepcopy(ours.state_dict())
    for other in (
        nn.Linear(2, 2),
        nn.Sequential(*list(model())[:3]),
        nn.Sequential(nn.Conv2d(3, 8, 3), *list(model())[1:]),
    ):
        with pytest.raises(ValueError, match=r"not the model|has shape"):
            ours.update_parameters(other)
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in before.items())
    with pytest.raises(ValueError, match="between 0 and 1"):
        average(model(), 1.5)
    with pytest.raises(ValueError, match="statistics must be"):
        average(model(), 0.9, statistics="absurd")
    with pytest.raises(ValueError, match="is lazy"):
        average(nn.Sequential(nn.LazyLinear(2)))


def test_no_gradients_and_evaluation_mode():
    net = model()
    ours = average(net, 0.9)
    assert not ours.module.training and not any(p.requires_grad for p in ours.parameters())
    ours.update_parameters(net)
    assert all(p.requires_grad for p in net.parameters())
    restored = average(model(), 0.9)
    restored.load_state_dict(ours.state_dict())
    assert restored.n_averaged == 1


def test_complex_parameters_are_averaged():
    net = nn.Module()
    net.w = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    ours, theirs = average(net, 0.5), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for value in (0, 2 + 2j):
        net.w.data.fill_(value)
        ours.update_parameters(net)
        theirs.update_parameters(net)
    torch.testing.assert_close(ours.module.w, theirs.module.w)


def test_an_average_may_be_cast_and_loaded():
    net = nn.Linear(2, 2).bfloat16()
    nn.init.ones_(net.weight)
    ours = average(net, 0.999).to(torch.bfloat16)
    for value in (1.0, 2.0):
        nn.init.constant_(net.weight, value)
        for _ in range(300):
            ours.update_parameters(net)
    assert abs(ours.module.weight.float().mean() - (2 - 0.999**300)) < 0.02
    ours.module.load_state_dict({"weight": torch.full((2, 2), 5.0), "bias": torch.zeros(2)})
    ours.update_parameters(net)
    assert ours.module.weight.float().mean() > 4.9


def test_frozen_layers_need_no_measuring():
    net, _ = bn.freeze(bn.upgrade(model())[0])
    ours = average(net, 0.9, statistics="measured")
    net[1].running_mean.fill_(3.0)
    ours.update_parameters(net)
    ours(torch.randn(2, 3, 6, 6))
    assert bool((ours.module[1].running_mean == 3).all())


MUTATIONS = [
    Mutation(
        "average: variances are averaged alone",
        "passes/average.py",
        "variance.lerp(new_variance, share) + spread",
        "variance.lerp(new_variance, share)",
        "that leaves out how far the means are apart",
    ),
    Mutation(
        "average: statistics of other weights pass for measured ones",
        "passes/average.py",
        "            self.is_measured.fill_(False)",
        "            pass",
        "evaluation would use the model's",
    ),
]
