"""The Inception network against figure 5 as data, against plain torch, and with each of its options."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.data.digits import Digits
from batchnorm.models.inception import BNInception, Outputs

# From figure 5, with 96 in 4c and 4d: 1×1, 3×3 reduce, 3×3, double reduce, double, pool, projection.
MODULES = {
    "3a": (64, 64, 64, 64, 96, "AvgPool2d", 32),
    "3b": (64, 64, 96, 64, 96, "AvgPool2d", 64),
    "3c": (0, 128, 160, 64, 96, "MaxPool2d", 0),
    "4a": (224, 64, 96, 96, 128, "AvgPool2d", 128),
    "4b": (192, 96, 128, 96, 128, "AvgPool2d", 128),
    "4c": (160, 128, 160, 128, 160, "AvgPool2d", 96),
    "4d": (96, 128, 192, 160, 192, "AvgPool2d", 96),
    "4e": (0, 128, 192, 192, 256, "MaxPool2d", 0),
    "5a": (352, 192, 320, 160, 224, "AvgPool2d", 128),
    "5b": (352, 192, 320, 192, 224, "MaxPool2d", 128),
}
OUTPUT_CHANNELS = [256, 320, 576, 576, 576, 576, 576, 1024, 1024, 1024]
SEPARABLE = [(3, 24, 7, 2, 3), (24, 64, 1, 1, 1)]
PLAIN = [(3, 64, 7, 2, 1)]
SMALL = [(3, 64, 3, 1, 1)]


def expected_convolutions(first=SEPARABLE, projection=96):
    """Input and output channels, kernel, stride and groups of each, in the order of the table."""
    found = [*first, (64, 64, 1, 1, 1), (64, 192, 3, 1, 1)]
    channels = 192
    for name, (one, three_reduce, three, double_reduce, double, _, projected) in MODULES.items():
        stride = 2 if name in ("3c", "4e") else 1
        if name in ("4c", "4d"):
            projected = projection
        found += [(channels, one, 1, 1, 1)] if one else []
        found += [(channels, three_reduce, 1, 1, 1), (three_reduce, three, 3, stride, 1)]
        found += [(channels, double_reduce, 1, 1, 1), (double_reduce, double, 3, 1, 1)]
        found += [(double, double, 3, stride, 1)]
        found += [(channels, projected, 1, 1, 1)] if projected else []
        channels = one + three + double + (projected or channels)
    return found


def weights_in(convolutions):
    return sum(outputs * inputs * kernel**2 // groups for inputs, outputs, kernel, _, groups in convolutions)


def convolutions_of(model: nn.Module) -> list[tuple[int, ...]]:
    found = [each for each in model.modules() if isinstance(each, nn.Conv2d)]
    assert all(each.padding == (each.kernel_size[0] // 2,) * 2 for each in found)
    return [
        (each.in_channels, each.out_channels, each.kernel_size[0], each.stride[0], each.groups)
        for each in found
    ]


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]


def parameters_in(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def on_meta(**options: object) -> BNInception:
    with torch.device("meta"):
        return BNInception(**options).eval()  # type: ignore[arg-type]


def small(**options: object) -> BNInception:
    generator = torch.Generator().manual_seed(3)
    given = {"stem": "small", "width": 0.1, "generator": generator, **options}
    return BNInception(10, **given)  # type: ignore[arg-type]


def shapes_at(model: BNInception, size: int) -> dict[str, tuple[int, int, int]]:
    """What comes out of the stem and of each module for an image of `size` pixels."""
    shapes = {}
    for name, each in (("stem", model.stem), *model.blocks.items()):
        each.register_forward_hook(
            lambda _, __, output, name=name: shapes.update({name: tuple(output.shape[1:])})
        )
    model(torch.empty(1, 3, size, size, device="meta"))
    return shapes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, expected_convolutions()),
        ({"separable_stem": False}, expected_convolutions(PLAIN)),
        ({"separable_stem": False, "pool_proj_4cd": 128}, expected_convolutions(PLAIN, 128)),
        ({"stem": "small"}, expected_convolutions(SMALL)),
    ],
)
def test_the_convolutions_are_those_of_figure_5(options, expected):
    assert convolutions_of(on_meta(**options)) == expected
    assert convolutions_of(on_meta(batch_norm=False, **options)) == expected


def test_the_pools_are_those_of_figure_5():
    model = on_meta()
    pools = [type(each).__name__ for each in model.modules() if "Pool" in type(each).__name__]
    assert pools == ["MaxPool2d"] * 2 + [pool for *_, pool, _ in MODULES.values()]


@pytest.mark.parametrize(
    ("options", "convolutions", "last", "millions"),
    [
        ({}, expected_convolutions(), 1024, 11.188),
        ({"separable_stem": False}, expected_convolutions(PLAIN), 1024, 11.195),
        ({"separable_stem": False, "pool_proj_4cd": 128}, expected_convolutions(PLAIN, 128), 1024, 11.285),
    ],
)
def test_the_parameters_are_counted_to_the_digit(options, convolutions, last, millions):
    channels = sum(outputs for _, outputs, *_ in convolutions if outputs != 24)
    expected = weights_in(convolutions) + 2 * channels + 1000 * last + 1000
    assert parameters_in(on_meta(**options)) == expected
    assert round(expected / 1e6, 3) == millions


def test_convolutions_batch_norm_and_classifier_have_their_shares_of_the_parameters():
    model = on_meta()
    norms = norms_of(model)
    assert len(norms) == 69
    assert sum(each.num_features for each in norms) == 9952
    shares = (
        weights_in(convolutions_of(model)),
        sum(map(parameters_in, norms)),
        parameters_in(model.classifier),
    )
    assert [round(each / 1e6, 3) for each in shares] == [10.143, 0.020, 1.025]


def test_the_auxiliary_head_makes_up_the_13_6_million_of_the_paper():
    model = on_meta(auxiliary=True)
    head = 576 * 128 + 2 * 128 + (16 * 128 * 768 + 768) + (768 * 1000 + 1000)
    assert parameters_in(model) == parameters_in(on_meta()) + head
    assert round(parameters_in(model) / 1e6, 2) == 13.60
    assert len(norms_of(model)) == 70


@pytest.mark.slow
@pytest.mark.parametrize(("separable", "billions"), [(True, 1.934), (False, 2.018)])
def test_the_convolutions_multiply_as_often_as_the_paper_s_table_says(separable, billions):
    model, counts = on_meta(separable_stem=separable), []
    for each in model.modules():
        if isinstance(each, nn.Conv2d):
            each.register_forward_hook(
                lambda its, _, output: counts.append(output.numel() * its.weight[0].numel())
            )
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    assert round(sum(counts) / 1e9, 3) == billions


@pytest.mark.parametrize(
    ("stem", "size", "stem_side", "sides"),
    [
        ("imagenet", 224, 28, [28, 28, 14, 14, 14, 14, 14, 7, 7, 7]),
        ("small", 28, 14, [14, 14, 7, 7, 7, 7, 7, 4, 4, 4]),
        ("small", 64, 32, [32, 32, 16, 16, 16, 16, 16, 8, 8, 8]),
    ],
)
def test_the_outputs_have_the_sizes_of_figure_5(stem, size, stem_side, sides):
    expected = {"stem": (192, stem_side, stem_side)}
    expected |= {
        name: (channels, side, side)
        for name, channels, side in zip(MODULES, OUTPUT_CHANNELS, sides, strict=True)
    }
    assert shapes_at(on_meta(stem=stem), size) == expected


def test_a_projection_of_128_widens_4c_4d_and_4e():
    shapes = shapes_at(on_meta(pool_proj_4cd=128), 224)
    assert [shapes[name][0] for name in MODULES] == [256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024]


@pytest.mark.slow
def test_width_multiplies_every_number_of_channels_but_the_depthwise_convolution_s():
    full, half, least = (on_meta(width=width, auxiliary=True) for width in (1.0, 0.5, 1e-4))
    assert [outputs for _, outputs, *_ in convolutions_of(half)] == [
        outputs if outputs == 24 else outputs // 2 for _, outputs, *_ in convolutions_of(full)
    ]
    assert {outputs for _, outputs, *_ in convolutions_of(least)} == {1, 24}
    assert half(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_every_batch_norm_is_ours_has_the_activation_and_follows_a_convolution_without_bias(stem, activation):
    model = on_meta(stem=stem, activation=activation)
    pairs = [
        pair
        for each in model.modules()
        if isinstance(each, nn.Sequential)
        for pair in pairwise(each)
        if isinstance(pair[1], nn.BatchNorm2d)
    ]
    assert len(pairs) == len(norms_of(model)) == 69
    for convolution, norm in pairs:
        assert isinstance(convolution, nn.Conv2d) and convolution.bias is None
        assert type(norm) is bn.BatchNorm2d
        assert (norm.activation, norm.eps) == (activation, 1e-3)
    assert not any(isinstance(each, nn.ReLU | nn.Sigmoid) for each in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "kind"), [("relu", nn.ReLU), ("sigmoid", nn.Sigmoid)])
def test_without_batch_norm_each_convolution_has_a_bias_and_the_activation_behind_it(activation, kind):
    model = on_meta(batch_norm=False, activation=activation)
    assert not norms_of(model)
    convolutions = [each for each in model.modules() if isinstance(each, nn.Conv2d)]
    assert [each.bias is None for each in convolutions] == [True] + [False] * 69
    pairs = [
        pair
        for each in model.modules()
        if isinstance(each, nn.Sequential)
        for pair in pairwise(each)
        if isinstance(pair[1], kind)
    ]
    assert [convolution for convolution, _ in pairs] == convolutions[1:]


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_networks_with_and_without_batch_norm_start_from_the_same_weights(stem):
    with_norm, without = (small(batch_norm=batch_norm, stem=stem) for batch_norm in (True, False))
    weights = [
        [each.weight for each in model.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
        for model in (with_norm, without)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert not any(value.any() for name, value in without.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(("activation", "gain"), [("relu", 2), ("sigmoid", 1)])
def test_initial_weights_have_the_standard_deviations_of_he(activation, gain):
    model = small(activation=activation, width=0.5)
    for each in model.blocks.modules():
        if isinstance(each, nn.Conv2d):
            expected = (gain / (each.in_channels * each.kernel_size[0] ** 2)) ** 0.5
            assert each.weight.std().item() == pytest.approx(expected, rel=0.1)
    assert model.classifier.weight.std().item() == pytest.approx(512**-0.5, rel=0.1)


def test_init_gain_multiplies_the_convolutions_only():
    once, thrice = small(auxiliary=True), small(auxiliary=True, init_gain=3.0)
    for (name, value), larger in zip(once.named_parameters(), thrice.parameters(), strict=True):
        factor = 3 if value.dim() == 4 else 1
        torch.testing.assert_close(larger, factor * value, msg=name)


def randomised(model: nn.Module) -> nn.Module:
    """`model` in float64, with γ and β as training might leave them."""
    for each in norms_of(model):
        nn.init.normal_(each.weight, 1, 0.3)
        nn.init.normal_(each.bias, 0, 0.3)
    return model.double()


def unit(state: dict[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    """Convolution, BN by the batch and ReLU, of plain torch."""
    weight = state[f"{name}.convolution.weight"]
    x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
    return F.relu(
        F.batch_norm(x, None, None, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"], True, 0.1, 1e-3)
    )


def mean_of_neighbours(x: Tensor) -> Tensor:
    """The mean of those of the nine pixels that are in the image."""
    return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)


@pytest.mark.parametrize("name", ["3b", "3c", "5b"])
def test_a_module_computes_what_plain_torch_does(name):
    block = randomised(small().blocks[name])
    state, stride = block.state_dict(), 2 if name == "3c" else 1
    x = torch.randn(3, next(block.parameters()).shape[1], 7, 7, dtype=torch.float64)
    one = [unit(state, "branches.1x1", x)] if name != "3c" else []
    three = unit(state, "branches.3x3.1", unit(state, "branches.3x3.0", x), stride)
    double = unit(state, "branches.double_3x3.1", unit(state, "branches.double_3x3.0", x))
    double = unit(state, "branches.double_3x3.2", double, stride)
    pooled = mean_of_neighbours(x) if name == "3b" else F.max_pool2d(x, 3, stride, 1)
    pool = pooled if name == "3c" else unit(state, "branches.pool.1", pooled)
    torch.testing.assert_close(block(x), torch.cat([*one, three, double, pool], 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lrn", [False, True])
def test_the_imagenet_stem_computes_what_plain_torch_does(lrn):
    stem = randomised(small(stem="imagenet", local_response_norm=lrn).stem)
    state = stem.state_dict()
    local = (lambda x: F.local_response_norm(x, 5, 1e-4, 0.75)) if lrn else (lambda x: x)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = unit(state, "first", F.conv2d(x, state["depthwise.weight"], None, 2, 3, groups=3))
    expected = local(F.max_pool2d(expected, 3, 2, 1))
    expected = local(unit(state, "second", unit(state, "reduce", expected)))
    expected = F.max_pool2d(expected, 3, 2, 1)
    torch.testing.assert_close(stem(x), expected, rtol=1e-10, atol=1e-10)


def test_logits_are_linear_in_the_mean_over_the_last_module_s_positions():
    model, seen = small().eval(), []
    model.blocks["5b"].register_forward_hook(lambda _, __, output: seen.append(output))
    logits = model(torch.randn(2, 3, 28, 28))
    torch.testing.assert_close(logits, F.linear(seen[0].mean((2, 3)), *model.classifier.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_local_response_normalization_surrounds_the_stem_s_second_stage(stem):
    kinds = [type(each).__name__ for each in on_meta(stem=stem, local_response_norm=True).stem]
    second = ["LocalResponseNorm", "Sequential", "Sequential", "LocalResponseNorm"]
    assert kinds[kinds.index("MaxPool2d") + 1 :][:4] == second
    assert kinds.count("LocalResponseNorm") == 2
    assert not any(isinstance(each, nn.LocalResponseNorm) for each in on_meta(stem=stem).modules())


@pytest.mark.parametrize(
    ("named", "side", "layers"), [(("5a", "5b"), 7, 14), (("4b", "4d"), 14, 14), ((), None, 0)]
)
def test_per_activation_gives_every_activation_of_the_named_modules_moments(named, side, layers):
    model = on_meta(per_activation=named, auxiliary=True)
    norms = {name: each for name, each in model.named_modules() if isinstance(each, nn.BatchNorm2d)}
    inside = {name for name in norms if name.split(".")[1] in named}
    assert len(inside) == layers
    for name, each in norms.items():
        assert each.running_mean is not None
        assert each.running_mean.shape == each.weight.shape == each.bias.shape
        assert each.weight.shape[1:] == ((side, side) if name in inside else ())


@pytest.mark.parametrize(("stem", "size", "side"), [("small", 28, 4), ("small", 37, 5), ("imagenet", 100, 4)])
def test_per_activation_takes_images_of_the_size_given_only(stem, size, side):
    model = small(stem=stem, per_activation=["5b"], image_size=size)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 10)
    assert {each.weight.shape[1:] for each in norms_of(model)} == {(), (side, side)}
    with pytest.raises(RuntimeError, match=r"expected \(N, \d+, \d, \d\), got shape"):
        model(torch.randn(2, 3, size + 32, size + 32))


def test_an_auxiliary_head_speaks_in_training_only():
    model = small(auxiliary=True)
    images = torch.randn(2, 3, 28, 28)
    outputs = model(images)
    assert isinstance(outputs, Outputs)
    assert outputs.logits.shape == outputs.auxiliary.shape == (2, 10)
    without = small()
    missing, unexpected = without.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(name.startswith("auxiliary.") for name in unexpected)
    assert torch.equal(model.eval()(images), without.eval()(images))


def reached(model: BNInception, output: Tensor) -> set[str]:
    """The parts of `model` whose parameters a gradient of `output` reaches."""
    model.zero_grad()
    output.square().sum().backward()
    names = [name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()]
    return {".".join(name.split(".")[: 2 if name.startswith("blocks") else 1]) for name in names}


def test_the_auxiliary_head_hangs_on_4d():
    model = small(auxiliary=True)
    images = torch.randn(2, 3, 28, 28)
    before = {"stem"} | {f"blocks.{name}" for name in MODULES if name <= "4d"}
    every = {"stem", "classifier"} | {f"blocks.{name}" for name in MODULES}
    assert reached(model, model(images).auxiliary) == before | {"auxiliary"}
    assert reached(model, model(images).logits) == every


def test_dropout_zeroes_features_of_the_classifier_in_training_only():
    model, seen = small(batch_norm=False, width=0.5, dropout=0.4), []
    model.classifier.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    images = torch.randn(4, 3, 28, 28)
    model(images)
    model.eval()(images)
    dropped, features = seen
    zeroed = dropped == 0
    assert zeroed[features != 0].float().mean().item() == pytest.approx(0.4, abs=0.05)
    torch.testing.assert_close(dropped[~zeroed], features[~zeroed] / 0.6)
    assert small().dropout.p == 0


def digits(count: int) -> tuple[Tensor, Tensor]:
    data = Digits.load()
    images = data.train_images[:count, None].float() / 255 - 0.5
    return images, data.train_labels[:count].long()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "sigmoid"},
        {"batch_norm": False},
        {"per_activation": ("5a", "5b"), "dropout": 0.05},
    ],
)
def test_a_few_steps_reduce_the_loss_on_digits(options):
    model = small(in_channels=1, **options)
    images, labels = digits(32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.slow
def test_memory_format_does_not_change_the_numbers():
    model = randomised(small())
    images = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    expected = model(images)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        other(images.to(memory_format=torch.channels_last)), expected, rtol=1e-9, atol=1e-9
    )


@pytest.mark.slow
def test_copies_and_checkpoints_say_the_same():
    options = {"auxiliary": True, "local_response_norm": True, "per_activation": ("5b",)}
    model = small(**options)
    images = torch.randn(2, 3, 28, 28)
    model(images)
    other = small(**options, init_gain=2.0)
    other.load_state_dict(model.state_dict())
    expected = model.eval()(images)
    assert torch.equal(other.eval()(images), expected)
    assert torch.equal(copy.deepcopy(model)(images), expected)


@pytest.mark.slow
def test_upgrade_finds_nothing_to_do():
    model = small()
    before = [(name, type(each)) for name, each in model.named_modules()]
    _, report = bn.upgrade(model)
    assert {layer.outcome for layer in report.layers} == {"left alone"}
    assert [(name, type(each)) for name, each in model.named_modules()] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, "no activation 'tanh': choose from relu, sigmoid"),
        ({"stem": "large"}, "no stem 'large': choose from imagenet, small"),
        ({"width": 0}, "width multiplies the numbers of channels: it must be positive, not 0"),
        ({"width": float("nan")}, "must be positive, not nan"),
        ({"width": float("inf")}, "must be positive, not inf"),
        ({"pool_proj_4cd": 0}, "pool_proj_4cd must be positive, not 0"),
        ({"image_size": 0}, "image_size must be positive, not 0"),
        ({"per_activation": ["5c"]}, "per_activation: no module '5c' of stride 1: 3a, 3b, 4a, "),
        ({"per_activation": ["5a", "4e"]}, "per_activation: no module '4e' of stride 1"),
        ({"per_activation": ["5a"], "batch_norm": False}, "per_activation .*batch_norm=False"),
        (
            {"auxiliary": True, "image_size": 16},
            "the auxiliary head pools 5×5, but images leave 4×4 after 4d",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
