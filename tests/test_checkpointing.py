"""Activation checkpointing runs a forward pass twice, and it counts once."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from batchnorm import BatchNorm1d, BatchNorm2d


def model(momentum):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        BatchNorm2d(4, momentum=momentum, activation="relu"),
        nn.Conv2d(4, 3, 3),
        BatchNorm2d(3, momentum=momentum),
        nn.Flatten(),
        nn.Linear(12, 3),
        BatchNorm1d(3, momentum=momentum),
    )


WAYS = {
    "whole": lambda m, x, mode: checkpoint(m, x, use_reentrant=mode),
    "a part within the model": lambda m, x, mode: m[2:](checkpoint(m[:2], x, use_reentrant=mode)),
    "each layer": lambda m, x, mode: checkpoint_sequential(m, len(m), x, use_reentrant=mode),
    "nested": lambda m, x, mode: checkpoint(
        lambda x: m[4:](
            checkpoint(lambda x: m[2:4](checkpoint(m[:2], x, use_reentrant=mode)), x, use_reentrant=mode)
        ),
        x,
        use_reentrant=mode,
    ),
}


def train(network, forward, steps=3):
    """Losses of a few steps; the parameters' gradients add up."""
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        # a gradient for x, without which the reentrant mode computes none at all
        loss = forward(network, torch.randn(5, 2, 6, 6).requires_grad_()).square().mean()
        loss.backward()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("way", WAYS)
def test_a_checkpointed_run_is_the_plain_run(way, reentrant, momentum):
    plain = model(momentum)
    checkpointed = copy.deepcopy(plain)
    losses = train(plain, lambda m, x: m(x))
    assert_close(train(checkpointed, lambda m, x: WAYS[way](m, x, reentrant)), losses, rtol=0, atol=0)
    assert_close(checkpointed.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert plain[1].num_batches_tracked == 3
    for name, parameter in plain.named_parameters():
        assert_close(checkpointed.get_parameter(name).grad, parameter.grad, rtol=0, atol=0)


def test_a_plain_second_forward_counts():
    layer, x = BatchNorm2d(2), torch.randn(5, 2, 6, 6, requires_grad=True)
    for passes in (1, 2):
        layer(x).sum().backward()
        assert layer.num_batches_tracked == passes


def test_gradients_of_gradients_do_not_count():
    layer, x = BatchNorm2d(2), torch.randn(5, 2, 6, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).exp().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_bad_batch_is_skipped_once(reentrant):
    layer, x = BatchNorm2d(2), torch.full((5, 2, 6, 6), torch.inf, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="inf or nan") as caught:
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert len(caught) == 1
    assert layer.num_batches_skipped == 1
