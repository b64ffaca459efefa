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
_EPS = 1e-3  # the paper gives none; TF-slim and soumith's version for Torch have this one


class Row(NamedTuple):
    """A row of figure 5: widths of a module's convolutions. Without `one` and `projection` it has stride 2."""

    name: str
    one: int
    three_reduce: int
    three: int
    double_reduce: int
    double: int
    pool: Literal["average", "max"]
    projection: int


# Figure 5 prints a projection of 128 in 4c and 4d, which does not add up to the 576 channels that it prints as their
# output; with 96 it does, and that is what Google's own TF-slim has.
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
    """What a network with an auxiliary head says in training: two sets of logits, (N, num_classes) each."""

    logits: Tensor
    auxiliary: Tensor


class BNInception(nn.Module):
    """Inception with batch normalization before every nonlinearity (Ioffe & Szegedy 2015, sec. 4.2 and figure 5).

    By default as TF-slim reads figure 5: 96 channels from the pooling branch in 4c and 4d, where the printed 128
    contradicts the printed sums, and a separable first convolution. 11.19 M parameters; with the auxiliary head
    13.60 M, which may be what the paper counted as 13.6 M. 69 BN layers, and one in the auxiliary head, whose hidden
    layer has none.

    Without batch normalization convolutions have biases (all but the depthwise one), and nothing else changes: networks
    with and without BN start from the same weights when `generator` has the same seed.

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
        make = _Maker(batch_norm, activation, width)
        size = _NATURAL_SIZE[stem] if image_size is None else image_size
        if stem == "imagenet":
            self.stem = _imagenet_stem(make, in_channels, separable_stem, local_response_norm)
            size = -(-size // 8)
        else:
            self.stem = _small_stem(make, in_channels, local_response_norm)
            size = -(-size // 2)
        channels = make.channels(192)
        self.blocks = nn.ModuleDict()
        for row in FIGURE_5:
            if row.name in ("4c", "4d"):
                row = row._replace(projection=pool_proj_4cd)
            if row.one == 0:
                size = -(-size // 2)
            spatial = (size, size) if row.name in per_activation else None
            block = Mixed(channels, row, replace(make, spatial=spatial))
            self.blocks[row.name] = block
            channels = block.out_channels
            if row.name == _AUXILIARY_AFTER:
                halfway = channels, size
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)
        self.auxiliary_after = None
        if auxiliary:  # last, so that the other weights are the same without it
            self.auxiliary_after = _AUXILIARY_AFTER
            self.auxiliary = _auxiliary_head(make, *halfway, num_classes)
        _initialise(self, activation, init_gain, generator)

    def forward(self, images: Tensor) -> Tensor | Outputs:
        """Logits (N, num_classes) of `images`, (N, in_channels, H, W); in training those of an auxiliary head too."""
        x = self.stem(images)
        auxiliary = None
        for name, block in self.blocks.items():
            x = block(x)
            if self.training and name == self.auxiliary_after:
                auxiliary = self.auxiliary(x)
        logits = self.classifier(self.dropout(x.mean((2, 3))))
        return logits if auxiliary is None else Outputs(logits, auxiliary)


class Mixed(nn.Module):
    """An Inception module: branches of one input, side by side in the output's channels."""

    def __init__(self, channels: int, row: Row, make: _Maker) -> None:
        super().__init__()
        stride = 1 if row.one else 2
        self.branches = nn.ModuleDict()
        if row.one:
            self.branches["1x1"] = make.unit(channels, row.one, 1)
        self.branches["3x3"] = nn.Sequential(
            make.unit(channels, row.three_reduce, 1),
            make.unit(make.channels(row.three_reduce), row.three, 3, stride),
        )
        self.branches["double_3x3"] = nn.Sequential(
            make.unit(channels, row.double_reduce, 1),
            make.unit(make.channels(row.double_reduce), row.double, 3),
            make.unit(make.channels(row.double), row.double, 3, stride),
        )
        pool: nn.Module = nn.MaxPool2d(3, stride, 1)
        if row.pool == "average":
            pool = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        passed = make.channels(row.projection) if row.projection else channels
        self.branches["pool"] = (
            nn.Sequential(pool, make.unit(channels, row.projection, 1)) if row.projection else pool
        )
        widths = [make.channels(each) for each in (row.one, row.three, row.double) if each]
        self.out_channels = sum(widths) + passed

    def forward(self, x: Tensor) -> Tensor:
        """The branches' outputs, (N, out_channels, H, W) or halved."""
        return torch.cat([branch(x) for branch in self.branches.values()], 1)


@dataclass(frozen=True)
class _Maker:
    """What all units of a network have in common; `spatial` where their BN is per activation."""

    batch_norm: bool
    activation: Nonlinearity
    width: float
    spatial: tuple[int, int] | None = None

    def channels(self, number: int) -> int:
        return max(1, round(number * self.width))

    def unit(self, channels: int, number: int, kernel: int, stride: int = 1) -> nn.Sequential:
        """A convolution from `channels` to the scaled `number` of channels, BN and the nonlinearity."""
        return self.normalised(
            nn.Conv2d(channels, self.channels(number), kernel, stride, kernel // 2, bias=not self.batch_norm)
        )

    def normalised(self, convolution: nn.Conv2d) -> nn.Sequential:
        """`convolution`, BN and the nonlinearity."""
        if not self.batch_norm:
            nonlinearity = _NONLINEARITIES[self.activation]()
            return _named(convolution=convolution, nonlinearity=nonlinearity)
        width = convolution.out_channels
        features = width if self.spatial is None else (width, *self.spatial)
        return _named(convolution=convolution, norm=BatchNorm2d(features, _EPS, activation=self.activation))


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _imagenet_stem(make: _Maker, in_channels: int, separable: bool, lrn: bool) -> nn.Sequential:
    width, bias = make.channels(64), not make.batch_norm
    if separable:
        depthwise = nn.Conv2d(in_channels, 8 * in_channels, 7, 2, 3, groups=in_channels, bias=False)
        pointwise = make.normalised(nn.Conv2d(8 * in_channels, width, 1, bias=bias))
        first = {"depthwise": depthwise, "first": pointwise}
    else:
        first = {"first": make.normalised(nn.Conv2d(in_channels, width, 7, 2, 3, bias=bias))}
    return _named(
        **first, pool=nn.MaxPool2d(3, 2, 1), **_second(make, lrn), second_pool=nn.MaxPool2d(3, 2, 1)
    )


def _small_stem(make: _Maker, in_channels: int, lrn: bool) -> nn.Sequential:
    return _named(first=make.unit(in_channels, 64, 3), pool=nn.MaxPool2d(3, 2, 1), **_second(make, lrn))


def _second(make: _Maker, lrn: bool) -> dict[str, nn.Module]:
    """The stem's 1×1 and 3×3 convolutions; LRN where GoogLeNet has it, before and after them."""
    reduce, second = make.unit(make.channels(64), 64, 1), make.unit(make.channels(64), 192, 3)
    if not lrn:
        return {"reduce": reduce, "second": second}
    return {
        "local_norm": nn.LocalResponseNorm(5),
        "reduce": reduce,
        "second": second,
        "second_local_norm": nn.LocalResponseNorm(5),
    }


def _auxiliary_head(make: _Maker, channels: int, size: int, num_classes: int) -> nn.Sequential:
    if size < 5:
        raise ValueError(f"the auxiliary head pools 5×5, but images leave {size}×{size} after 4d")
    pooled = ((size - 5) // 3 + 1) ** 2
    hidden = make.channels(768)
    return nn.Sequential(
        nn.AvgPool2d(5, 3),
        make.unit(channels, 128, 1),
        nn.Flatten(),
        nn.Linear(make.channels(128) * pooled, hidden),
        _NONLINEARITIES[make.activation](),
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
        raise ValueError("per_activation is about batch normalization, which batch_norm=False leaves out")
