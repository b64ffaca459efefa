"""`bn.mask`: the padding of a model's input, in each of its layers."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from tests.mutations.mutation import Mutation

LENGTHS = torch.tensor([23, 1, 14, 0, 8])


def sequences(channels=3, size=23):
    return torch.randn(len(LENGTHS), channels, size, dtype=torch.float64)


def network(*strides, stride_of=nn.Conv1d):
    """Convolutions of single positions, so that padding reaches nothing but the layers' statistics."""
    torch.manual_seed(0)
    layers = []
    for channels, stride in zip((3, 4, 5, 6), strides, strict=False):
        layers += [
            stride_of(channels, channels + 1, 1, stride),
            bn.BatchNorm1d(channels + 1, activation="relu"),
        ]
    return nn.Sequential(*layers).double()


def packed(model, x, lengths, strides):
    """The same by torch's layers: what is no padding, of all sequences, as one sequence; and its loss."""
    parts = [each[:, :length] for each, length in zip(x, lengths.tolist(), strict=True)]
    for place, stride in enumerate(strides):
        convolution, ours = model[2 * place], model[2 * place + 1]
        parts = [
            convolution.weight[:, :, 0] @ each[:, ::stride] + convolution.bias[:, None] for each in parts
        ]
        together = nn.BatchNorm1d(ours.num_features, dtype=x.dtype)(torch.cat(parts, 1)[None])
        parts = list(together[0].relu().split([each.size(1) for each in parts], 1))
    return parts, sum(each.square().sum() for each in parts)


@pytest.mark.parametrize("given", ["lengths", "int32", "mask", "one channel"])
@pytest.mark.parametrize("strides", [(1,), (1, 2), (2, 2, 2), (3, 1, 2), (5, 2)])
def test_layers_see_what_is_left_of_the_sequences(strides, given):
    model, x = network(*strides), sequences().requires_grad_()
    mask = torch.arange(23) < LENGTHS[:, None]
    masks = {"lengths": LENGTHS, "int32": LENGTHS.int(), "mask": mask, "one channel": mask[:, None]}
    with bn.mask(model, masks[given]):
        y = model(x)
        loss = y.square().sum()
    parts, expected = packed(model, x, LENGTHS, strides)
    for found, part in zip(y, parts, strict=True):
        assert_close(found[:, : part.size(1)], part)
        assert not found[:, part.size(1) :].any()
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


class Pooled(nn.Module):
    """Functional pooling, whose stride nobody but the sizes tells."""

    def __init__(self, *sizes):
        super().__init__()
        self.sizes = sizes
        self.layers = nn.ModuleList(bn.BatchNorm1d(3) for _ in sizes).double()

    def forward(self, x):
        for size, layer in zip(self.sizes, self.layers, strict=True):
            x = layer(F.interpolate(x, size) if size < x.size(2) else x)
        return x


def given_to(model, mask, x):
    """The mask that each layer was given, by path."""
    seen = {}

    def note(name, _, __, kwargs):
        seen[name] = kwargs["mask"]

    layers = [
        (name, each)
        for name, each in model.named_modules()
        if isinstance(each, nn.modules.batchnorm._BatchNorm)
    ]
    handles = [
        layer.register_forward_pre_hook(partial(note, name), with_kwargs=True) for name, layer in layers
    ]
    with bn.mask(model, mask):
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("sizes", "stride"), [((23,), 1), ((12,), 2), ((11,), 2), ((23, 12, 6), 4), ((8,), 3), ((12, 6, 3), 8)]
)
def test_a_stride_follows_from_sizes(sizes, stride):
    mask = torch.rand(5, 23) < 0.5
    seen = given_to(Pooled(*sizes), mask, sequences())
    assert_close(seen[f"layers.{len(sizes) - 1}"], mask[:, None, ::stride][:, :, : sizes[-1]])


@pytest.mark.parametrize("sizes", [(21,), (2,), (12, 10), (5,)])
def test_what_does_not_follow_is_an_error_at_the_layer(sizes):
    model, mask = Pooled(*sizes), torch.arange(23) < 14
    said = rf"layer 'layers.{len(sizes) - 1}': .*\(5, 3, {sizes[-1]}\).*\(5, 23\).*mask="
    with bn.mask(model, mask.expand(5, 23)), pytest.raises(ValueError, match=said):
        model(sequences())
    model(sequences())
    assert not any(layer._forward_pre_hooks for layer in model.layers)


def test_strides_that_leave_the_same_are_no_doubt():
    full = torch.ones(5, 23, dtype=torch.bool)
    assert given_to(Pooled(2), full, sequences())["layers.0"].all()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "googlenet"])
def test_in_convolutional_networks_masks_stride_along(name):
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = bn.upgrade(models.get_model(name, weights=None, **options))[0]
    x, mask = torch.randn(2, 3, 64, 64), torch.rand(2, 64, 64) < 0.5
    shapes = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, path=path: shapes.update({path: args[0].shape}))
        for path, layer in model.named_modules()
        if isinstance(layer, bn.BatchNorm2d)
    ]
    seen = given_to(model, mask, x)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(shapes) and {shape[2] for shape in shapes.values()} >= {32, 16, 8, 4, 2}
    for path, found in seen.items():
        stride = 64 // shapes[path][2]
        assert_close(found, mask[:, None, ::stride, ::stride], msg=path)


def test_a_single_position_counts_samples_that_have_any():
    model = nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.AdaptiveAvgPool1d(1), bn.BatchNorm1d(4), nn.Flatten(), bn.BatchNorm1d(4)
    ).double()
    left = torch.arange(23) >= 23 - LENGTHS[:, None]  # padded on the left
    for mask in (LENGTHS, left):
        seen = given_to(model, mask, sequences())
        assert_close(seen["2"], (LENGTHS > 0)[:, None, None])
        assert_close(seen["4"], (LENGTHS > 0)[:, None])


class Spectrograms(nn.Module):
    def __init__(self):
        super().__init__()
        self.plane = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), bn.BatchNorm2d(2), nn.ReLU())
        self.line = nn.Sequential(nn.Conv1d(8, 4, 3, padding=1), bn.BatchNorm1d(4))

    def forward(self, x):
        return self.line(self.plane(x).flatten(1, 2))


def test_lengths_are_of_the_last_dimension_whatever_comes_before():
    seen = given_to(Spectrograms(), LENGTHS, torch.randn(5, 1, 8, 23))
    expected = (torch.arange(23) < LENGTHS[:, None])[:, ::2]
    assert_close(seen["plane.1"].expand(5, 1, 4, 12), expected[:, None, None].expand(5, 1, 4, 12))
    assert_close(seen["line.1"], expected[:, None])


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(50, 6), bn.BatchNorm1d(6)

    def forward(self, batch, scale=1.0):
        return self.norm(self.words(batch["ids"]).transpose(1, 2) * scale)


def test_the_model_s_input_may_be_tokens_in_a_dictionary():
    model = Tokens()
    batch = {"weights": torch.ones(5), "ids": torch.randint(50, (5, 23))}
    expected = torch.arange(23) < LENGTHS[:, None]
    assert_close(given_to(model, LENGTHS, batch)["norm"], expected[:, None])
    for length in (23, 30):  # lengths are counted along each input
        batch["ids"] = torch.randint(50, (5, length))
        with bn.mask(model, LENGTHS):
            y = model(batch=batch, scale=2.0)
        assert_close((y != 0).any(1), torch.arange(length) < LENGTHS[:, None])


def test_a_layer_s_own_mask_and_the_inner_block_come_first():
    layer, x = bn.BatchNorm1d(3, dtype=torch.float64), sequences()
    inner = LENGTHS.clamp(max=4)
    expected = bn.BatchNorm1d(3, dtype=torch.float64)(x, mask=inner)
    with bn.mask(layer, LENGTHS):
        assert_close(layer(x, mask=inner), expected)
        assert_close(layer(x, None, inner), expected)
        with bn.mask(layer, inner):
            assert_close(layer(x), expected)
            assert_close(layer(input=x), expected)
        assert (layer(x) != 0).sum() > (expected != 0).sum()
    assert (layer(x) != 0).all()


def test_the_state_and_the_hooks_are_as_before():
    model = network(1, 2)
    keys, hooks = list(model.state_dict()), [[*vars(each)] for each in model.modules()]
    with bn.mask(model, LENGTHS):
        assert list(model.state_dict()) == keys
    assert [[*vars(each)] for each in model.modules()] == hooks
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in model.modules())


class Own(bn.BatchNorm1d):
    def forward(self, *inputs, **options):
        return super().forward(*inputs, **options)


@pytest.mark.parametrize("other", [nn.BatchNorm1d, nn.SyncBatchNorm, Own])
def test_layers_that_take_no_mask_are_named(other):
    model = nn.Sequential(bn.BatchNorm1d(3), nn.Sequential(other(3)))
    with pytest.raises(ValueError, match=r"'1.0' .*takes no mask: .*bn.upgrade"), bn.mask(model, LENGTHS):
        pass
    assert not model[0]._forward_pre_hooks


def test_compiled_models_are_refused():
    model = nn.Sequential(bn.BatchNorm1d(3))
    compiled: Any
    for compiled in (torch.compile(model), nn.ModuleList([torch.compile(model)])):  # type: ignore[list-item]
        with pytest.raises(ValueError, match="is compiled"), bn.mask(compiled, LENGTHS):
            pass
    model.compile()
    with pytest.raises(ValueError, match="'model' is compiled"), bn.mask(model, LENGTHS):
        pass


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        ([3, 4], TypeError, "as_tensor"),
        (torch.ones(5, 23), TypeError, r"got torch.float32, \(5, 23\)"),
        (torch.ones(5, 23, dtype=torch.int64), TypeError, r"mask.bool\(\)"),
        (torch.tensor(True), TypeError, "mask must be a bool tensor"),
        (LENGTHS[:4], ValueError, r"lengths .* \(5, 3, 23\)"),
        (LENGTHS + 1, ValueError, r"lengths \[24, .*last dimension .*bool mask"),
        (torch.ones(4, 23, dtype=torch.bool), ValueError, r"layer '1'.*\(5, 4, 23\).*\(4, 23\)"),
        (torch.ones(5, 2, 23, dtype=torch.bool), ValueError, r"layer '1'.*\(5, 2, 23\)"),
    ],
)
def test_a_mask_that_is_none_says_what_it_should_be(mask, error, match):
    model = network(1)
    with pytest.raises(error, match=match), bn.mask(model, mask):
        model(sequences())


def test_lengths_of_another_dimension_are_refused():
    model = nn.Sequential(nn.Linear(46, 3), bn.BatchNorm1d(23))
    with bn.mask(model, LENGTHS), pytest.raises(ValueError, match=r"\(5, 23, 46\)"):
        model(torch.randn(5, 23, 46))


def test_parts_of_a_model_know_a_mask_but_no_lengths():
    model, x = network(1), sequences()
    with bn.mask(model, torch.arange(23) < LENGTHS[:, None]):
        y = model[1](model[0](x))
    assert not y[1, :, 1:].any()
    with bn.mask(model, LENGTHS), pytest.raises(ValueError, match="layer '1' was called without the model"):
        model[1](model[0](x))


MUTATIONS = [
    Mutation(
        "strides beyond the size",
        "passes/mask.py",
        "torch.arange(size, device=mask.device) * stride",
        "torch.arange(size, device=mask.device)",
        "the first positions instead of each second",
        ("passes/test_mask.py",),
    ),
    Mutation(
        "any stride will do",
        "passes/mask.py",
        "if not masks or not all(torch.equal(masks[0], other) for other in masks[1:]):",
        "if not masks:",
        "of two that leave so many positions one is wrong",
        ("passes/test_mask.py",),
    ),
    Mutation(
        "the outer block first",
        "passes/mask.py",
        "register_forward_pre_hook(hand_over, prepend=True",
        "register_forward_pre_hook(hand_over, prepend=False",
        "contexts nest",
        ("passes/test_mask.py",),
    ),
]
