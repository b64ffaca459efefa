"""The Inception network of the paper's ImageNet experiments, with and without batch normalization."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.layers import BatchNorm2d

Nonlinearity = Literal["relu", "sigmoid"]
Stem = Literal["imagenet", "small"]
_NONLINEARITIES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}
_EPS = 1e-3  # not in the paper; that of TF-slim and of soumith's version for Torch


class Row(NamedTuple):
    """A row of figure 5: the widths of a module's convolutions. If `one` and `projection` are 0 it has stride 2."""

    name: str
    one: int
    three_reduce: int
    three: int
    double_reduce: int
    double: int
    pool: Literal["average", "max"]
    projection: int


# Figure 5 prints a projection of 128 in 4c and 4d, which is inconsistent with its 576 output channels. 96 is
# consistent, and is the value of Google's TF-slim.
FIGURE_5 = (
    Row("3a", 64, 64, 64, 64, 96, "average", 32),
    Row("3b", 64, 64, 96, 64, 96, "average", 64),
    Row("3c", 0, 128, 160, 64, 96, "max", 0),
    Row("4a", 224, 64, 96, 96, 128, "average", 128),
    Row("4b", 192, 96, 128, 96, 128, "average", 128),
    Row("4c", 160, 128, 160, 128, 160, "average", 96),
    Row("4d", 96, 128, 192, 160, 192, "average", 96),
    Row("4e", 0, 128, 192, 192, 256, "max", 0),
    Row("5a", 352, 192, 320, 160, 224, "average", 128),
    Row("5b", 352, 192, 320, 192, 224, "max", 128),
)
_AUXILIARY_AFTER = "4d"
_NATURAL_SIZE = {"imagenet": 224, "small": 28}


class Outputs(NamedTuple):
    """The outputs in training of a network with an auxiliary head: two sets of logits, (N, num_classes) each."""

    logits: Tensor
    auxiliary: Tensor


class BNInception(nn.Module):
    """Inception with batch normalization before every nonlinearity (Ioffe & Szegedy 2015, sec. 4.2 and figure 5).

    By default as in TF-slim: 96 channels from the pooling branch in 4c and 4d, since the printed 128 contradicts the
    printed sums, and a separable first convolution. It has 11.19 M parameters; with the auxiliary head 13.60 M, which
    may be the 13.6 M of the paper. It has 69 BN layers, and one more in the auxiliary head, not after its hidden layer.

    Without batch normalization convolutions have biases (all but the depthwise one), and nothing else changes: networks
    with and without BN have the same initial weights when `generator` has the same seed.

    Args:
        num_classes: number of outputs, logits.
        batch_norm: BN before each nonlinearity, fused with it; the convolutions' biases, which β replaces, are dropped.
        activation: "relu" or "sigmoid".
        width: multiplies every number of channels but the depthwise convolution's.
        stem: "imagenet" for images of 224 pixels: three halvings, to 28, before module 3a. "small" for 28 to 64 pixels:
            3×3 convolutions and one halving.
        in_channels: of the images.
        pool_proj_4cd: channels from the pooling branch in 4c and 4d: 96, or 128 as printed (and as in the versions for
            Caffe and MXNet), which makes the output of 4c, 4d and 4e 608, 608 and 1056 channels.
        separable_stem: the first convolution of the ImageNet stem is depthwise, 8 channels for each of the input's,
            then 1×1.
        auxiliary: a second classifier, after 4d, whose logits come out in training too.
        dropout: probability of zeroing one of the features before the classifier, in training.
        local_response_norm: LRN in the stem, as in GoogLeNet; the paper removes it.
        per_activation: names of modules ("5a", "5b") whose BN has moments, γ and β for every single activation, as in
            the networks of the paper's ensemble; these then take images of `image_size` only.
        image_size: height and width in pixels, where something depends on it: `per_activation` and `auxiliary`. By
            default 224, or 28 with the small stem.
        init_gain: multiplies the convolutions' initial weights: normal, of variance 2/fan-in for ReLU, 1/fan-in for
            sigmoid (He et al. 2015; the paper does not say). Linear layers start with 1/fan-in either way, and
            unmultiplied. Biases and β start at 0, γ at 1.
        generator: source of the initial weights.

    Raises: ValueError for a name, number or combination that is none of the above.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        batch_norm: bool = True,
        activation: Nonlinearity = "relu",
        width: float = 1.0,
        stem: Stem = "imagenet",
        in_channels: int = 3,
        pool_proj_4cd: int = 96,
        separable_stem: bool = True,
        auxiliary: bool = False,
        dropout: float = 0.0,
        local_response_norm: bool = False,
        per_activation: Collection[str] = (),
        image_size: int | None = None,
        init_gain: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check(activation, stem, width, pool_proj_4cd, image_size, per_activation, batch_norm)
        factory = _UnitFactory(batch_norm, activation, width)
        size = _NATURAL_SIZE[stem] if image_size is None else image_size
        if stem == "imagenet":
            self.stem = _imagenet_stem(factory, in_channels, separable_stem, local_response_norm)
            size = -(-size // 8)
        else:
            self.stem = _small_stem(factory, in_channels, local_response_norm)
            size = -(-size // 2)
        channels = factory.channels(192)
        self.blocks = nn.ModuleDict()
        for row in FIGURE_5:
            if row.name in ("4c", "4d"):
                row = row._replace(projection=pool_proj_4cd)
            if row.one == 0:
                size = -(-size // 2)
            spatial = (size, size) if row.name in per_activation else None
            block = Mixed(channels, row, replace(factory, spatial=spatial))
            self.blocks[row.name] = block
            channels = block.out_channels
            if row.name == _AUXILIARY_AFTER:
                halfway = channels, size
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)
        self.auxiliary_after = None
        if auxiliary:  # created last, so that it does not change the initial weights of the rest
            self.auxiliary_after = _AUXILIARY_AFTER
            self.auxiliary = _auxiliary_head(factory, *halfway, num_classes)
        _initialise(self, activation, init_gain, generator)

    def forward(self, images: Tensor) -> Tensor | Outputs:
        """Logits (N, num_classes) of `images`, (N, in_channels, H, W); in training also those of the auxiliary head."""
        x = self.stem(images)
        auxiliary = None
        for name, block in self.blocks.items():
            x = block(x)
            if self.training and name == self.auxiliary_after:
                auxiliary = self.auxiliary(x)
        logits = self.classifier(self.dropout(x.mean((2, 3))))
        return logits if auxiliary is None else Outputs(logits, auxiliary)


class Mixed(nn.Module):
    """An Inception module: branches on the same input, concatenated along the channels."""

    def __init__(self, channels: int, row: Row, factory: _UnitFactory) -> None:
        super().__init__()
        stride = 1 if row.one else 2
        self.branches = nn.ModuleDict()
        if row.one:
            self.branches["1x1"] = factory.unit(channels, row.one, 1)
        self.branches["3x3"] = nn.Sequential(
            factory.unit(channels, row.three_reduce, 1),
            factory.unit(factory.channels(row.three_reduce), row.three, 3, stride),
        )
        self.branches["double_3x3"] = nn.Sequential(
            factory.unit(channels, row.double_reduce, 1),
            factory.unit(factory.channels(row.double_reduce), row.double, 3),
            factory.unit(factory.channels(row.double), row.double, 3, stride),
        )
        pool: nn.Module = nn.MaxPool2d(3, stride, 1)
        if row.pool == "average":
            pool = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        pool_channels = factory.channels(row.projection) if row.projection else channels
        self.branches["pool"] = (
            nn.Sequential(pool, factory.unit(channels, row.projection, 1)) if row.projection else pool
        )
        widths = [factory.channels(width) for width in (row.one, row.three, row.double) if width]
        self.out_channels = sum(widths) + pool_channels

    def forward(self, x: Tensor) -> Tensor:
        """The concatenated branches, (N, out_channels, H, W), or H/2 and W/2 with stride 2."""
        return torch.cat([branch(x) for branch in self.branches.values()], 1)


@dataclass(frozen=True)
class _UnitFactory:
    """Builds convolution units with common settings; `spatial` is the size of maps with BN per activation."""

    batch_norm: bool
    activation: Nonlinearity
    width: float
    spatial: tuple[int, int] | None = None

    def channels(self, number: int) -> int:
        return max(1, round(number * self.width))

    def unit(self, channels: int, number: int, kernel: int, stride: int = 1) -> nn.Sequential:
        """A convolution from `channels` to the scaled `number` of channels, BN and the nonlinearity."""
        return self.convolution_bn(
            nn.Conv2d(channels, self.channels(number), kernel, stride, kernel // 2, bias=not self.batch_norm)
        )

    def convolution_bn(self, convolution: nn.Conv2d) -> nn.Sequential:
        """`convolution`, BN and the nonlinearity."""
        if not self.batch_norm:
            nonlinearity = _NONLINEARITIES[self.activation]()
            return _sequential(convolution=convolution, nonlinearity=nonlinearity)
        width = convolution.out_channels
        features = width if self.spatial is None else (width, *self.spatial)
        return _sequential(
            convolution=convolution, norm=BatchNorm2d(features, _EPS, activation=self.activation)
        )


def _sequential(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _imagenet_stem(factory: _UnitFactory, in_channels: int, separable: bool, lrn: bool) -> nn.Sequential:
    width, bias = factory.channels(64), not factory.batch_norm
    if separable:
        depthwise = nn.Conv2d(in_channels, 8 * in_channels, 7, 2, 3, groups=in_channels, bias=False)
        pointwise = factory.convolution_bn(nn.Conv2d(8 * in_channels, width, 1, bias=bias))
        first = {"depthwise": depthwise, "first": pointwise}
    else:
        first = {"first": factory.convolution_bn(nn.Conv2d(in_channels, width, 7, 2, 3, bias=bias))}
    return _sequential(
        **first, pool=nn.MaxPool2d(3, 2, 1), **_second(factory, lrn), second_pool=nn.MaxPool2d(3, 2, 1)
    )


def _small_stem(factory: _UnitFactory, in_channels: int, lrn: bool) -> nn.Sequential:
    return _sequential(
        first=factory.unit(in_channels, 64, 3), pool=nn.MaxPool2d(3, 2, 1), **_second(factory, lrn)
    )


def _second(factory: _UnitFactory, lrn: bool) -> dict[str, nn.Module]:
    """The stem's 1×1 and 3×3 convolutions, with LRN before and after them as in GoogLeNet."""
    reduce, second = factory.unit(factory.channels(64), 64, 1), factory.unit(factory.channels(64), 192, 3)
    if not lrn:
        return {"reduce": reduce, "second": second}
    return {
        "local_norm": nn.LocalResponseNorm(5),
        "reduce": reduce,
        "second": second,
        "second_local_norm": nn.LocalResponseNorm(5),
    }


def _auxiliary_head(factory: _UnitFactory, channels: int, size: int, num_classes: int) -> nn.Sequential:
    if size < 5:
        raise ValueError(f"the auxiliary head pools 5×5, but images leave {size}×{size} after 4d")
    pooled = ((size - 5) // 3 + 1) ** 2
    hidden = factory.channels(768)
    return nn.Sequential(
        nn.AvgPool2d(5, 3),
        factory.unit(channels, 128, 1),
        nn.Flatten(),
        nn.Linear(factory.channels(128) * pooled, hidden),
        _NONLINEARITIES[factory.activation](),
        nn.Linear(hidden, num_classes),
    )


@torch.no_grad()
def _initialise(
    model: nn.Module, activation: Nonlinearity, gain: float, generator: torch.Generator | None
) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            if isinstance(module, nn.Conv2d):
                std = gain * math.sqrt((2 if activation == "relu" else 1) / fan_in)
            else:
                std = math.sqrt(1 / fan_in)
            module.weight.normal_(0, std, generator=generator)
            if module.bias is not None:
                module.bias.zero_()


def _check(
    activation: str,
    stem: str,
    width: float,
    pool_proj_4cd: int,
    image_size: int | None,
    per_activation: Collection[str],
    batch_norm: bool,
) -> None:
    for what, value, known in (("activation", activation, _NONLINEARITIES), ("stem", stem, _NATURAL_SIZE)):
        if value not in known:
            raise ValueError(f"no {what} {value!r}: choose from {', '.join(known)}")
    if not 0 < width < math.inf:
        raise ValueError(f"width multiplies the numbers of channels: it must be positive, not {width}")
    for name, number in (("pool_proj_4cd", pool_proj_4cd), ("image_size", image_size)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be positive, not {number}")
    modules = [row.name for row in FIGURE_5 if row.one]
    unknown = [name for name in per_activation if name not in modules]
    if unknown:
        raise ValueError(f"per_activation: no module {unknown[0]!r} of stride 1: {', '.join(modules)}")
    if per_activation and not batch_norm:
        raise ValueError(
            "per_activation needs batch normalization: it cannot be combined with batch_norm=False"
        )
