"""The networks without batch normalization are the same otherwise, and stay in range."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from batchnorm.bench import networks


def test_without_norm_every_layer_s_output_is_of_order_one():
    model = networks.build("mlp")
    x = torch.rand(networks.shape("mlp", 64, 32))
    weights = deepcopy(model.state_dict())
    without_bn = networks.without_norm(model, x)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in without_bn.modules())
    assert len(list(without_bn.modules())) == len(list(model.modules()))
    for module in without_bn.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, output: scales.append(output.std().item()))
    scales: list[float] = []
    without_bn(x)
    assert scales == pytest.approx([1, 1, 1, 1], rel=1e-4)


def test_running_statistics_are_set_to_the_batch_s():
    model = networks.build("mlp")
    x = torch.rand(networks.shape("mlp", 64, 32))
    networks.set_running_statistics(model, x)
    linear, norm = list(model.children())[:2]
    assert isinstance(norm, nn.BatchNorm1d)
    torch.testing.assert_close(norm.running_mean, linear(x).mean(0))
    assert norm.momentum == 0.1


def test_a_step_that_leaves_the_finite_numbers_is_no_measurement():
    model = nn.Linear(3, 10)
    with torch.no_grad():
        model.weight.fill_(torch.inf)
    with pytest.raises(FloatingPointError):
        networks.step(model, torch.rand(4, 3))()
