"""A model before and after an upgrade: the same outputs, gradients and statistics in both modes."""

import copy

import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn


def unlike(model):
    """Let every layer of `model` have numbers of its own, in place: none is 0 or 1."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                if module.bias is not None:
                    module.bias.normal_()
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
    return model


def tensors(output):
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [each for value in values if value is not None for each in tensors(value)]


def near(actual, expected, tolerance=1e-8):
    """Near on the scale of the largest number: a sum of many may be nearly 0."""
    assert actual.dtype == expected.dtype
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    assert_close(actual, expected, rtol=tolerance, atol=tolerance * (scale + 1e-2))


def same(ours, theirs, *inputs, tolerance=1e-8, gradients=True):
    """Run both, evaluating, training and evaluating again, and compare everything; the inputs too."""
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    evaluating = [module for module in theirs.modules() if not module.training]
    for training in (False, True, False):
        results = []
        for model in (theirs, ours):
            model.train(training)
            model.zero_grad()
            given = copy.deepcopy(inputs)
            leaves = [each.requires_grad_() for each in given if isinstance(each, Tensor)]
            with torch.random.fork_rng(), torch.set_grad_enabled(gradients):
                torch.manual_seed(1)
                outputs = tensors(
                    model(*[each.clone() if isinstance(each, Tensor) else each for each in given])
                )
                after = torch.rand(1)  # as many random numbers were drawn
            if any(each.requires_grad for each in outputs):
                sum(each.sin().sum() for each in outputs if each.requires_grad).backward()
            slopes = [each.grad for each in (*model.parameters(), *leaves)]
            results.append((outputs, slopes, [*model.state_dict().values(), after]))
        for expected, actual in zip(*results, strict=True):
            assert len(expected) == len(actual)
            for a, b in zip(actual, expected, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    near(a, b, tolerance)
    for module in theirs.modules():
        module.training = module not in evaluating


def beside(model, **options):
    """`model` with numbers of its own, its upgraded copy, and the report."""
    theirs = unlike(model)
    return theirs, *bn.upgrade(copy.deepcopy(theirs), **options)


def upgraded(model, *inputs, tolerance=1e-8, gradients=True, **options):
    """The upgraded copy of `model`, compared with it, and the report."""
    theirs, ours, report = beside(model.double() if tolerance == 1e-8 else model, **options)
    same(ours, theirs, *inputs, tolerance=tolerance, gradients=gradients)
    return ours, report
