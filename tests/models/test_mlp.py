"""The network of figure 1: what stands where, and the same start with and without batch normalization."""

import pytest
import torch
from torch import nn

from batchnorm.models.mlp import MLP


def build(batch_norm: bool, **options: object) -> MLP:
    generator = torch.Generator().manual_seed(3)
    return MLP(784, batch_norm=batch_norm, generator=generator, **options)  # type: ignore[arg-type]


def test_both_networks_start_from_the_same_weights():
    weights = [[m.weight for m in build(bn).modules() if isinstance(m, nn.Linear)] for bn in (True, False)]
    assert [tuple(w.shape) for w in weights[0]] == [(100, 784), (100, 100), (100, 100), (10, 100)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_batch_norm_stands_before_every_nonlinearity_and_replaces_the_bias():
    kinds = [type(m).__name__ for m in build(True).layers]
    assert kinds == ["Flatten"] + ["Linear", "BatchNorm1d", "Sigmoid"] * 3 + ["Linear"]
    kinds = [type(m).__name__ for m in build(False, dropout=0.5).layers]
    assert kinds == ["Flatten"] + ["Linear", "Sigmoid", "Dropout"] * 3 + ["Linear"]
    assert [m.bias is None for m in build(True).modules() if isinstance(m, nn.Linear)] == [True] * 3 + [False]
    assert not any(m.bias is None for m in build(False).modules() if isinstance(m, nn.Linear))


def test_initial_weights_have_the_standard_deviations_asked_for():
    linear = [m for m in build(False, init_std=0.3, output_std=0.02).modules() if isinstance(m, nn.Linear)]
    assert linear[0].weight.std().item() == pytest.approx(0.3, rel=0.02)
    assert linear[-1].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(not m.bias.any() for m in linear)


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "relu"])
def test_the_last_nonlinearity_is_the_one_before_the_output(nonlinearity):
    model = build(True, nonlinearity=nonlinearity, dropout=0.1)
    position = list(model.layers).index(model.last_nonlinearity)
    assert [type(m).__name__ for m in model.layers][position:] == [
        type(model.last_nonlinearity).__name__,
        "Dropout",
        "Linear",
    ]


def test_takes_images_and_gives_logits():
    assert build(True)(torch.rand(4, 28, 28)).shape == (4, 10)
