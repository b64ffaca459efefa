"""The public surface is a contract: a name or an argument that comes, goes or moves must be meant."""

from inspect import Parameter, signature

import pytest
import torch

import batchnorm as bn
from tests.kernels.processes import said
from tests.mutations.mutation import Mutation

NAMES = (
    {"Affine", "Moments", "__version__", "batch_norm", "bridges", "kernels", "keep_memory", "return_memory"}
    | {"BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"}
    | {"LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"}
    | {"ShiftMeter"}
    | {"Ghost", "Population", "Ramp", "Renorm", "Sync", "domain"}
    | {
        "adapt",
        "average",
        "configure",
        "convert_sync",
        "downgrade",
        "examine",
        "export",
        "fold",
        "freeze",
        "insert",
        "mask",
        "merge_states",
        "param_groups",
        "population",
        "paused",
        "reduce_statistics",
        "save_memory",
        "split_state",
        "strip_bias",
        "unfreeze",
        "upgrade",
        "virtual_batch",
        "watch",
        "zero_init_residual",
    }
)
LAYERS = [bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d]


def arguments(function, kind):
    return {
        name: parameter.default
        for name, parameter in signature(function).parameters.items()
        if parameter.kind is kind
    }


def test_dir_is_the_checked_list():
    assert set(dir(bn)) == NAMES


def test_a_star_imports_them_all_and_nothing_else():
    # in a fresh interpreter, where none has been asked for yet
    script = """
before = {*globals(), "before"}
from batchnorm import *
print(*sorted(set(globals()) - before))
assert batch_norm.__module__ == "batchnorm.functional"
"""
    assert said(script).split() == sorted(NAMES - {"__version__"})


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_name_resolves(name):
    assert getattr(bn, name) is getattr(bn, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'batchnorm' has no attribute 'BatchNorm4d'"):
        bn.BatchNorm4d  # noqa: B018  # asking for it is the test


def test_batch_norm_begins_as_torch_s_and_adds_keywords():
    torch_s = arguments(torch.nn.functional.batch_norm, Parameter.POSITIONAL_OR_KEYWORD)
    ours = arguments(bn.batch_norm, Parameter.POSITIONAL_OR_KEYWORD)
    assert list(ours.items()) == list(torch_s.items())
    assert arguments(bn.batch_norm, Parameter.KEYWORD_ONLY) == {
        "activation": None,
        "residual": None,
        "mask": None,
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_made_as_torch_s_and_adds_keywords(layer):
    torch_s = getattr(torch.nn, layer.__name__)
    positional = arguments(layer, Parameter.POSITIONAL_OR_KEYWORD)
    assert list(positional.items()) == list(arguments(torch_s, Parameter.POSITIONAL_OR_KEYWORD).items())
    assert list(positional) == [
        "num_features", "eps", "momentum", "affine", "track_running_stats", "device", "dtype",
    ]  # fmt: skip
    keywords = arguments(torch_s, Parameter.KEYWORD_ONLY) | {
        "bias": True, "activation": None, "statistics": None, "debiased": False, "on_single": "raise",
    }  # fmt: skip
    assert arguments(layer, Parameter.KEYWORD_ONLY) == keywords


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_s_forward_takes_a_residual_and_a_mask(layer):
    assert list(signature(layer.forward).parameters) == ["self", "input", "residual", "mask"]


MUTATIONS = [
    Mutation(
        "no list of public names", "__init__.py",
        "__all__ = [*_HOME]", "__all_names__ = [*_HOME]",
        "from batchnorm import * gives import_module instead",
    ),
]  # fmt: skip
