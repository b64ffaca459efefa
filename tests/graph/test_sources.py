"""Which channels of which convolution come to a layer: held against a change of each, in forwards that are odd."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.graph.observation import BATCH_NORM, observe
from batchnorm.graph.sources import NotLinear, sources
from tests.mutations.mutation import Mutation

X = torch.randn(2, 6, 8, 8)


class Model(nn.Module):
    """A BN after what `forward` makes of the children."""

    def __init__(self, before, features, **children):
        super().__init__()
        self.before = before
        for name, child in children.items():
            self.add_module(name, child)
        self.bn = nn.BatchNorm2d(features)

    def forward(self, x):
        return self.bn(self.before(self, x))


def found_in(model, x=X):
    seen = observe(model.eval(), x)
    norm = [operation for operation in seen.operations if operation.name in BATCH_NORM][-1]
    return sources(norm.reads[0], tensor_of(model))


def tensor_of(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return lambda value: tensors[value.name].detach().double()


def shuffled(y):
    return y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)


CASES = {
    "a convolution": (lambda m, x: m.a(x), 8),
    "a slice of its channels": (lambda m, x: m.a(x)[:, 2:7], 5),
    "shuffled channels": (lambda m, x: shuffled(m.a(x)), 8),
    "a split, one part": (lambda m, x: m.a(x).chunk(2, 1)[1], 4),
    "a split, turned round": (lambda m, x: torch.cat(m.a(x).chunk(2, 1)[::-1], 1), 8),
    "a concatenation": (lambda m, x: torch.cat([m.a(x), m.b(x)], 1), 13),
    "a sum": (lambda m, x: m.a(x) + m.c(x), 8),
    "a difference, in place": (lambda m, x: m.a(x).sub_(m.c(x)), 8),
    "a sum of concatenations": (lambda m, x: torch.cat([m.a(x), m.b(x)], 1) + torch.cat([m.six(x), m.seven(x)], 1), 13),
    "pooled": (lambda m, x: F.avg_pool2d(m.a(x), 2), 8),
    "a mean over positions": (lambda m, x: m.a(x).mean((2, 3), keepdim=True), 8),
    "channels last and back": (lambda m, x: m.a(x).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), 8),
    "a linear layer": (lambda m, x: m.linear(x.flatten(2).transpose(1, 2)).transpose(1, 2)[..., None], 5),
    "a linear layer without bias": (lambda m, x: m.plain(x.flatten(1))[:, :, None, None], 4),
    "a transposed convolution": (lambda m, x: m.transposed(x), 9),
    "groups": (lambda m, x: m.grouped(x), 12),
    "a factor": (lambda m, x: m.a(x) * m.c.weight[:, 0], 8),
    "a number": (lambda m, x: 2 - m.a(x) * 3, 8),
    "beside what it reads": (lambda m, x: m.six(x) + x, 6),
}  # fmt: skip
REFUSED = {
    "an activation": (lambda m, x: m.a(x).relu(), 8, "it comes from aten.relu"),
    "the input": (lambda m, x: x, 6, "it comes from the input"),
    "a sum with what no convolution reads": (lambda m, x: m.six(x) + x.relu(), 6, "it comes from aten.relu"),
    "one that is read elsewhere": (lambda m, x: (y := m.six(x)) + 0 * y.relu(), 6, "read elsewhere too"),
    "a mean over channels": (lambda m, x: m.a(x).mean(1, keepdim=True), 1, "mixed"),
    "zeros around": (lambda m, x: F.pad(m.a(x), (1, 1)), 8, "it comes from aten.constant_pad_nd"),
    "positions as channels": (lambda m, x: m.a(x).transpose(1, 2), 8, "mixed"),
    "a channel twice": (lambda m, x: torch.cat([(y := m.a(x)), y], 1), 16, "several channels"),
    "a flat image": (lambda m, x: m.a(x).flatten(1)[:, :, None, None], 512, "several channels"),
    "a product": (lambda m, x: m.a(x) * m.c(x), 8, "it comes from aten.mul"),
    "a square": (lambda m, x: (y := m.a(x)) * y, 8, "it comes from aten.mul"),
    "divided by it": (lambda m, x: 1 / m.a(x), 8, "it comes from aten.reciprocal"),
    "a parameter over it": (lambda m, x: m.c.weight[0, 0] / m.a(x), 8, "it comes from|divided by"),
    "whole numbers of it": (lambda m, x: torch.div(m.a(x), 2, rounding_mode="floor"), 8, "with a rounding"),
    "a factor of each position": (
        lambda m, x: m.six(x) * m.plain.weight[0].view(6, 8, 8), 6, "not in all positions of a channel with one factor",
    ),
    "changed through a view": (lambda m, x: double_a_part(m.a(x)), 8, "observation.reread"),
}  # fmt: skip


def double_a_part(y):
    y[:, 0].mul_(2)
    return y


def children():
    return {
        "a": nn.Conv2d(6, 8, 3, padding=1),
        "b": nn.Conv2d(6, 5, 3, padding=1),
        "c": nn.Conv2d(6, 8, 1, bias=False),
        "six": nn.Conv2d(6, 6, 1),
        "seven": nn.Conv2d(6, 7, 1),
        "linear": nn.Linear(6, 5),
        "plain": nn.Linear(384, 4, bias=False),
        "transposed": nn.ConvTranspose2d(6, 9, 3, groups=3),
        "grouped": nn.Conv2d(6, 12, 3, groups=3),
    }


def output_channels(module, weight_dim):
    return module.out_channels if isinstance(module, nn.ConvTranspose2d) else module.weight.size(weight_dim)


@pytest.mark.parametrize("case", CASES)
def test_a_change_of_a_channel_changes_what_was_said(case):
    """The oracle: adds to a bias, or scales an output, and looks at what changes before the BN."""
    before, features = CASES[case]
    model = Model(before, features, **children()).double().eval()
    x = X.double()
    found = found_in(model, x).sources
    with torch.no_grad():
        whole = before(model, x)
    names = dict(model.named_parameters())
    assert found
    for source in found:
        module = model.get_submodule(source.linear.weight.name.rpartition(".")[0])
        assert names[source.linear.weight.name] is module.weight
        for channel, place in enumerate(source.channels.tolist()):

            def scaled(_, __, y, channel=channel, module=module):
                dim = 1 if y.dim() == 4 or not isinstance(module, nn.Linear) else y.dim() - 1
                factors = torch.ones(y.size(dim), dtype=y.dtype)
                factors[channel] = 3
                return y * factors.view([-1 if at == dim else 1 for at in range(y.dim())])

            handle = module.register_forward_hook(scaled)
            with torch.no_grad():
                difference = (before(model, x) - whole).abs().amax((0, 2, 3))
            handle.remove()
            changed = difference.gt(1e-9).nonzero().flatten().tolist()
            assert changed == ([] if place < 0 else [place]), (source.linear.weight.name, channel)


def test_what_is_added_is_found_by_its_elements():
    def before(m, x):
        y = m.linear(x.flatten(2).transpose(1, 2)) + m.positions  # which adds its bias by itself
        return y.transpose(1, 2)[..., None]

    model = Model(before, 5, **children())
    model.positions = nn.Parameter(torch.randn(64, 5))
    origin = found_in(model)
    found, terms = origin.sources, origin.terms
    assert [source.linear.weight.name for source in found] == ["linear.weight"]
    channels = {term.value.name: term.channels for term in terms}
    assert channels["positions"].tolist() == [[0, 1, 2, 3, 4]] * 64
    assert channels.get("linear.bias", torch.arange(5)).tolist() == [0, 1, 2, 3, 4]
    model.before = lambda m, x: m.six(x)[:, :5] + m.positions[0, 0]  # one number for all channels
    with pytest.raises(NotLinear, match="positions comes to several channels"):
        found_in(model)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_linear_says_why(case):
    before, features, says = REFUSED[case]
    with pytest.raises(NotLinear, match=says):
        found_in(Model(before, features, **children()))


def test_what_the_model_returns_or_reads_elsewhere_is_not_only_the_layer_s():
    class Two(Model):
        def forward(self, x):
            y = self.get_submodule("a")(x)
            return self.bn(y.flip(0)[:, :8]), y

    model = Two(None, 8, a=nn.Conv2d(6, 8, 1)).eval()
    seen = observe(model, X)
    norm = next(operation for operation in seen.operations if operation.name in BATCH_NORM)
    with pytest.raises(NotLinear, match=r"it comes from aten\.flip"):
        sources(norm.reads[0], tensor_of(model))

    class Elsewhere(Model):
        def forward(self, x):
            y = self.get_submodule("a")(x)
            return self.bn(y.transpose(2, 3)) + y.relu()

    seen = observe(Elsewhere(None, 8, a=nn.Conv2d(6, 8, 1)).eval(), X)
    norm = next(operation for operation in seen.operations if operation.name in BATCH_NORM)
    with pytest.raises(NotLinear, match=r"what aten\.convolution makes is read elsewhere too"):
        sources(norm.reads[0], tensor_of(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"), [("levit_128s", 50), ("mixnet_s", 49), ("repvit_m0_9", 83), ("hrnet_w18_small", 91)]
)
def test_of_real_networks(name, least):
    timm = pytest.importorskip("timm")
    size = 224 if "levit" in name else 64
    model = timm.create_model(name).eval()
    seen = observe(model, torch.randn(1, 3, size, size))
    linear = 0
    for operation in seen.operations:
        if operation.name in BATCH_NORM:
            with contextlib.suppress(NotLinear):
                linear += bool(sources(operation.reads[0], tensor_of(model)).sources)
    assert linear >= least


MUTATIONS = [
    Mutation(
        "mixed channels pass", "graph/sources.py",
        "    if not bool((decoded - decoded[:, :1]).abs().le(_CLOSE).all()):\n", "    if False:\n",
        "a scale would be given to a convolution that has it for other channels too",
    ),
    Mutation(
        "what is read elsewhere is not looked for", "graph/sources.py",
        "return result is not self.value and any(users) and not all(users)", "return False",
        "the other reader would see scaled values",
    ),
    Mutation(
        "factors that differ within a channel", "graph/sources.py",
        "    if not bool((scale - by).abs().le(_CLOSE * by.abs()).all()) or not bool((by != 0).all()):",
        "    if False:",
        "a shift would come multiplied by each of them",
    ),
]  # fmt: skip
