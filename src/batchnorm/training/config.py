"""The configuration of a training run, as in run.toml. With the data it determines every number, up to rounding.

Rounding depends on the number of threads, which unless given is that of the free cores. Names of optimizers, schedules
and precisions are torch's own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from batchnorm.models.inception import Nonlinearity, Stem

# The sections that may change when a run is resumed: where it runs and how often it is saved.
RESUMABLE_SECTIONS = {"machine", "checkpoints"}
_MANY = 10**15  # of steps, images, ...: more than there can be
_LARGEST_BATCH = 2**20
INCEPTION: Literal["bn-inception"] = "bn-inception"
_WEIGHTS = "a file of weights to start from, torchvision's, timm's or of a run; a head for other classes is not taken"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class InceptionModel(_Section):
    """`[model]` with name = "bn-inception": the arguments of `batchnorm.models.BNInception`."""

    name: Literal["bn-inception"] = Field(
        INCEPTION,
        description="or any classification model of torchvision or timm, whose other keys are dropout and weights",
    )
    batch_norm: bool = Field(True, description="before every nonlinearity")
    activation: Nonlinearity = Field("relu", description='or "sigmoid"')
    width: float = Field(1.0, gt=0, le=16, description="multiplies every number of channels")
    stem: Stem = Field("imagenet", description='for images of 224 pixels; "small" for 28 to 64')
    pool_proj_4cd: int = Field(
        96,
        ge=1,
        le=16_384,
        description="channels of the pooling branch in modules 4c and 4d; figure 5 prints 128",
    )
    separable_stem: bool = Field(True, description="the first convolution depthwise, then 1×1")
    auxiliary: bool = Field(False, description="a second classifier after module 4d")
    dropout: float = Field(0.4, ge=0, lt=1, description="before the classifier; 0.4 is GoogLeNet's")
    local_response_norm: bool = Field(False, description="in the stem, as in GoogLeNet")
    per_activation: tuple[str, ...] = Field(
        (), description="modules whose BN has separate moments for every activation"
    )
    init_gain: float = Field(1.0, gt=0, le=1e6, description="multiplies the convolutions' initial weights")
    weights: str | None = Field(None, description=_WEIGHTS)


class LibraryModel(_Section):
    """`[model]` with any other name: a classification model of torchvision or timm, its BN ours by `bn.upgrade`."""

    name: str = Field(description='a model of torchvision or else of timm; "timm/resnet18" is timm\'s')
    dropout: float | None = Field(None, ge=0, lt=1, description="for models that have this argument")
    weights: str | None = Field(None, description=_WEIGHTS)


Model = Annotated[
    Annotated[InceptionModel, Tag("inception")] | Annotated[LibraryModel, Tag("library")],
    Discriminator(
        lambda model: (
            "inception"
            if (model.get("name", INCEPTION) if isinstance(model, dict) else model.name) == INCEPTION
            else "library"
        )
    ),
]


class Data(_Section):
    """`[data]`: the data set, its cropping and distortion, and its order."""

    source: str = Field(
        "mnist-10k",
        description="a name (mnist-10k, mnist, fashion-mnist, cifar-10), a folder in ImageNet's layout "
        "(train/CLASS/*.jpg, val/CLASS/*.jpg), or a folder of WebDataset shards (train-*.tar, val-*.tar)",
    )
    image_size: int = Field(224, ge=8, le=8192, description="height and width of a crop in pixels")
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
        1000, ge=1, le=_MANY, description="examples in a shard, for data that does not come in shard files"
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
    """`[optimizer]`: unless given, SGD with momentum, its rate decaying exponentially in steps."""

    name: Literal["SGD", "AdamW"] = Field("SGD", description='of torch.optim; or "AdamW"')
    rate: float = Field(0.0015, gt=0, description="initial learning rate; 0.0015 is the paper's Inception")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="of AdamW"
    )
    weight_decay: float = Field(
        2e-4,
        ge=0,
        le=1e6,
        description="L2, on the weights of convolutions and linear layers; AdamW's is decoupled from the gradient",
    )
    schedule: Literal["StepLR", "CosineAnnealingLR"] = Field(
        "StepLR", description='of torch.optim.lr_scheduler; or "CosineAnnealingLR", to 0 at the last step'
    )
    decay: float = Field(
        0.96, gt=0, le=1, description="of StepLR: the rate is multiplied by it every decay_every steps"
    )
    decay_every: int = Field(
        320_000, ge=1, le=_MANY, description="of StepLR: steps; 320,000 are 8 epochs of ImageNet"
    )
    warmup: int = Field(
        0, ge=0, le=_MANY, description="steps over which the rate rises linearly, before the schedule begins"
    )

    @model_validator(mode="after")
    def _only_its_own(self) -> Self:
        """What another optimizer or schedule would use and this one would not is no setting of it."""
        for key, chosen, owner in (
            ("momentum", self.name, "SGD"),
            ("betas", self.name, "AdamW"),
            ("decay", self.schedule, "StepLR"),
            ("decay_every", self.schedule, "StepLR"),
        ):
            if chosen != owner and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is {owner}'s, and {chosen} has none: leave it out")
        return self


class Schedule(_Section):
    """`[training]`: number of steps, batch size, seed and precision."""

    steps: int = Field(ge=1, le=_MANY, description="number of SGD steps")
    batch_size: int = Field(32, ge=2, le=_LARGEST_BATCH, description="images per step, over all processes")
    micro_batch: int | None = Field(
        None,
        ge=1,
        le=_LARGEST_BATCH,
        description="largest number of images per pass in one process; statistics and gradients are the whole batch's",
    )
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description="of initial weights, data order, distortions and dropout"
    )
    sync: bool = Field(False, description="BN normalises by the samples of all processes")
    precision: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="of activations; float64 applies to the weights too, for comparing runs"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of an average of the weights, kept beside them"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of torch.nn.CrossEntropyLoss")
    auxiliary_weight: float = Field(
        0.3, ge=0, le=1e6, description="of the auxiliary head's loss; GoogLeNet's"
    )
    patience: int | None = Field(
        None,
        ge=1,
        le=_MANY,
        description="stop after this many evaluations in a row without a new best accuracy",
    )


class Evaluations(_Section):
    """`[evaluation]`: when the network is evaluated, and on what."""

    every: int | None = Field(
        None, ge=1, le=_MANY, description="steps between evaluations; unless given, an epoch"
    )
    apart: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="instead of every: the gap as a share of the steps so far, at least 10 steps",
    )
    first: int = Field(1, ge=1, le=_MANY, description="no evaluation before this step")
    images: int | None = Field(
        None,
        ge=1,
        le=_MANY,
        description="size of a fixed random subset of the validation set; unless given, all",
    )
    population_batches: int = Field(
        20, ge=1, le=_MANY, description="training batches over which Algorithm 2 averages"
    )
    batch_size: int = Field(
        250, ge=1, le=_LARGEST_BATCH, description="images per forward pass in one process"
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.every is not None and self.apart is not None:
            raise ValueError("give every or apart, not both")
        return self


class Checkpoints(_Section):
    """`[checkpoints]`: how often they are written, and how many are kept."""

    every_seconds: float = Field(
        600,
        gt=0,
        le=1e9,
        description="seconds between checkpoints; one is also written when the run ends or is stopped",
    )
    keep: int = Field(
        3,
        ge=1,
        le=_MANY,
        description="number of newest checkpoints kept, besides the best and final networks",
    )


class Machine(_Section):
    """`[machine]`: where the run computes. Affects results by rounding only; may differ when a run is resumed."""

    device: Literal["auto", "cpu"] = Field("auto", description="an accelerator where there is one")
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="threads of one process on a CPU; unless given, one for each core that is free when a run starts",
    )
    loaders: int = Field(
        0, ge=0, le=256, description="processes that read and distort images, for each training process"
    )
    channels_last: bool = Field(True, description="the memory layout of images and weights")
    keep_memory: bool = Field(True, description="see bn.keep_memory; on a CPU only")
    save_memory: bool = Field(
        False, description="make outputs of BN again in the backward pass, see bn.save_memory"
    )


class Config(_Section):
    """A whole run.toml.

    It is also a job of an experiment, with `steps` and a `cost` in the unit that all jobs share.
    """

    model: Model = InceptionModel()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    training: Schedule
    evaluation: Evaluations = Evaluations()
    checkpoints: Checkpoints = Checkpoints()
    machine: Machine = Machine()

    def with_values(self, section: str, **values: object) -> Self:
        """A copy with new `values` for keys of `section`. They are not validated."""
        part = getattr(self, section).model_copy(update=values)
        return self.model_copy(update={section: part})

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if self.optimizer.warmup >= self.training.steps:
            raise ValueError(
                f"optimizer.warmup = {self.optimizer.warmup:,}: a run of training.steps = {self.training.steps:,} "
                "would end before it"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What makes a run this one, by section: it must not change when the run is resumed.

        The number of steps may, unless the schedule depends on it.
        """
        values = self.model_dump(exclude=RESUMABLE_SECTIONS)
        if self.optimizer.schedule == "StepLR":
            del values["training"]["steps"]
        return values

    @property
    def steps(self) -> int:
        """The largest number of steps."""
        return self.training.steps

    @property
    def cost(self) -> float:
        """The expected duration in steps, whatever the width of the network."""
        return float(self.training.steps)
