"""Whole models in files: what their pickles name is public, and after `downgrade` nothing of it is ours."""

import pickle
import pickletools

import pytest
import torch
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.graph.modules import Fused
from batchnorm.graph.rewrite import Rewriting, Source, reconstruct
from tests.passes.compare import unlike


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LeakyReLU(0.2)

    def forward(self, x):
        return self.act(self.norm(self.conv(x)) + x)


LAYERS = nn.Conv2d, nn.LeakyReLU, nn.ReLU, nn.Identity, nn.Sequential
OURS = bn.BatchNorm2d, Fused, Rewriting, Source, reconstruct


def model():
    return bn.upgrade(unlike(nn.Sequential(Block(), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))))[0]


def test_weights_only_reads_what_was_downgraded(tmp_path):
    # a rewritten forward is code, which weights_only is there to refuse
    ours = model().eval()
    x = torch.randn(2, 3, 4, 4)
    expected = ours(x)
    torch.save(bn.downgrade(ours)[0], tmp_path / "model.pt")
    with safe_globals([Block, nn.BatchNorm2d, *LAYERS]):
        assert_close(torch.load(tmp_path / "model.pt", weights_only=True)(x), expected)


def test_weights_only_reads_layers_without_a_rewritten_forward(tmp_path):
    ours = nn.Sequential(bn.BatchNorm2d(3, activation="relu"), bn.BatchNorm2d(3, statistics=bn.Ghost(2)))
    torch.save(ours, tmp_path / "model.pt")
    with safe_globals([bn.BatchNorm2d, bn.Ghost, nn.Sequential]):
        again = torch.load(tmp_path / "model.pt", weights_only=True)
    x = torch.randn(4, 3, 4, 4)
    assert_close(again(x), ours(x))


def test_what_it_has_to_be_allowed_is_public(tmp_path):
    torch.save(model(), tmp_path / "model.pt")
    named = get_unsafe_globals_in_checkpoint(tmp_path / "model.pt")
    ours = {name for name in named if name.startswith("batchnorm.")}
    assert ours == {f"{each.__module__}.{each.__qualname__}" for each in OURS}
    assert not any(part.startswith("_") for name in ours for part in name.split("."))


@pytest.mark.parametrize(
    "statistics", [bn.Ghost(2), bn.Sync(), bn.Renorm.scheduled(), bn.Population(bn.Ghost(2))], ids=repr
)
def test_a_layer_s_pickle_names_what_is_public(statistics, tmp_path):
    code = pickle.dumps(bn.BatchNorm2d(3, statistics=statistics))
    names = [str(argument) for opcode, argument, _ in pickletools.genops(code) if "UNICODE" in opcode.name]
    modules = [name for name in names if name.startswith("batchnorm.")]
    assert modules and not any(part.startswith("_") for name in modules for part in name.split("."))
