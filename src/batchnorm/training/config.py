"""What decides a training run, as it stands in run.toml: with the data, these values decide every number."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from batchnorm.models.inception import Nonlinearity, Stem

# What may change when a run is continued: where it runs and how often its state is saved, but no number.
ELSEWHERE = {"machine", "checkpoints"}
INCEPTION: Literal["bn-inception"] = "bn-inception"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class InceptionModel(_Section):
    """`[model]` with name = "bn-inception": the arguments of `batchnorm.models.BNInception`."""

    name: Literal["bn-inception"] = Field(
        INCEPTION,
        description="or any classification model of torchvision, which has dropout for a key at most",
    )
    batch_norm: bool = Field(True, description="before every nonlinearity")
    activation: Nonlinearity = Field("relu", description="or sigmoid")
    width: float = Field(1.0, gt=0, description="multiplies every number of channels")
    stem: Stem = Field("imagenet", description="for images of 224 pixels, or small for 28 to 64")
    pool_proj_4cd: int = Field(96, ge=1, description="of modules 4c and 4d; 128 as figure 5 prints")
    separable_stem: bool = Field(True, description="the first convolution depthwise, then 1×1")
    auxiliary: bool = Field(False, description="a second classifier after module 4d")
    dropout: float = Field(0.4, ge=0, lt=1, description="before the classifier; 0.4 is GoogLeNet's")
    local_response_norm: bool = Field(False, description="in the stem, as in GoogLeNet")
    per_activation: tuple[str, ...] = Field(
        (), description="modules whose BN has moments for every single activation"
    )
    init_gain: float = Field(1.0, gt=0, description="multiplies the convolutions' initial weights")


class TorchvisionModel(_Section):
    """`[model]` with any other name: a classification model of torchvision, its BN made ours by `bn.upgrade`."""

    name: str
    dropout: float | None = Field(None, ge=0, lt=1, description="for models that have this argument")


Model = Annotated[
    Annotated[InceptionModel, Tag("inception")] | Annotated[TorchvisionModel, Tag("torchvision")],
    Discriminator(
        lambda model: (
            "inception"
            if (model.get("name", INCEPTION) if isinstance(model, dict) else model.name) == INCEPTION
            else "torchvision"
        )
    ),
]


class Data(_Section):
    """`[data]`: which images, how they are cropped and distorted, in which order they come."""

    source: str = Field(
        "mnist-10k",
        description="a name (mnist-10k, mnist, fashion-mnist, cifar-10), a folder in ImageNet's layout "
        "(train/CLASS/*.jpg, val/CLASS/*.jpg), or a folder of WebDataset shards (train-*.tar, val-*.tar)",
    )
    image_size: int = Field(224, ge=8, description="height and width of a crop in pixels")
    crop_area: tuple[float, float] = Field(
        (0.08, 1.0), description="share of the image that a training crop covers, from and to; GoogLeNet's"
    )
    mirror: bool = Field(True, description="swap left and right of a training image with probability 1/2")
    distortion: Literal["full", "reduced", "none"] = Field(
        "full", description="photometric distortion of training images"
    )
    shuffle: Literal["shards", "within-shards"] = Field(
        "within-shards",
        description="each epoch shuffles the order of the shards, or the examples within them too (section 4.2.1)",
    )
    shard_size: int = Field(
        1000, ge=1, description="examples in a shard, for data that does not come in shard files"
    )
    corrupt_share: float = Field(
        0.01, ge=0, le=1, description="a larger share of images that cannot be read stops the run"
    )

    @field_validator("crop_area")
    @classmethod
    def _in_order(cls, area: tuple[float, float]) -> tuple[float, float]:
        if not 0 < area[0] <= area[1] <= 1:
            raise ValueError("a share of the image, from and to: 0 < from ≤ to ≤ 1")
        return area


class Optimizer(_Section):
    """`[optimizer]`: SGD with momentum, the rate decaying exponentially in steps."""

    rate: float = Field(0.0015, gt=0, description="initial learning rate; 0.0015 is the paper's Inception")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(
        2e-4, ge=0, description="L2, on the weights of convolutions and linear layers"
    )
    decay: float = Field(0.96, gt=0, le=1, description="factor on the rate ...")
    decay_every: int = Field(
        320_000, ge=1, description="... every so many steps; 320,000 are 8 epochs of ImageNet"
    )


class Schedule(_Section):
    """`[training]`: how long, in which batches, with which numbers."""

    steps: int = Field(ge=1, description="of SGD")
    batch_size: int = Field(32, ge=2, description="images a step, over all processes")
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="at most so many at a time in one process; the statistics and gradients are the whole batch's",
    )
    seed: int = Field(0, ge=0, description="of initial weights, data order, distortions and dropout")
    sync: bool = Field(False, description="BN normalises by the samples of all processes")
    precision: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="of activations; float64 that of the weights too, to compare runs by"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of an average of the weights, kept beside them"
    )
    auxiliary_weight: float = Field(0.3, ge=0, description="of the auxiliary head's loss; GoogLeNet's")
    patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations in a row without a new best accuracy"
    )


class Evaluations(_Section):
    """`[evaluation]`: when, and by which statistics."""

    every: int | None = Field(None, ge=1, description="steps; unless given, an epoch")
    apart: float | None = Field(
        None, gt=0, description="instead: a share of the steps so far, at least 10, to the next evaluation"
    )
    first: int = Field(1, ge=1, description="no evaluation before this step")
    images: int | None = Field(
        None, ge=1, description="of the validation set, chosen once at random; unless given, all"
    )
    population_batches: int = Field(20, ge=1, description="training batches over which Algorithm 2 averages")
    batch_size: int = Field(250, ge=1, description="images at a time in one process")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.every is not None and self.apart is not None:
            raise ValueError("give every or apart, not both")
        return self


class Checkpoints(_Section):
    """`[checkpoints]`: when, and how many are kept beside the best one."""

    every_seconds: float = Field(600, gt=0, description="and when the run ends or is stopped")
    keep: int = Field(3, ge=1, description="the newest so many, beside the best network and the final one")


class Machine(_Section):
    """`[machine]`: what must not change a result but for rounding; may differ when a run is continued."""

    device: Literal["auto", "cpu"] = Field("auto", description="an accelerator where there is one")
    threads: int | None = Field(
        None, ge=1, description="of one process on a CPU; unless given, torch's default"
    )
    loaders: int = Field(
        0, ge=0, description="processes that read and distort images, for each training process"
    )
    channels_last: bool = Field(True, description="the memory layout of images and weights")
    keep_memory: bool = Field(True, description="see bn.keep_memory; on a CPU only")


class Config(_Section):
    """A whole run.toml.

    As a job among others it takes `steps`, and a `cost` that all jobs of an experiment have in a common unit.
    """

    model: Model = InceptionModel()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    training: Schedule
    evaluation: Evaluations = Evaluations()
    checkpoints: Checkpoints = Checkpoints()
    machine: Machine = Machine()

    def changed(self, section: str, **values: object) -> Self:
        """A copy in which these keys of a section have these values, which are not checked again."""
        part = getattr(self, section).model_copy(update=values)
        return self.model_copy(update={section: part})

    @property
    def steps(self) -> int:
        """How many it takes, at most."""
        return self.training.steps

    @property
    def cost(self) -> float:
        """How long it takes, in steps; a network's width is not looked at."""
        return float(self.training.steps)
