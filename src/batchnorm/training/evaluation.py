"""A trained network's class probabilities on labelled images, by one crop of each image or by 144.

    saved = load("runs/NAME")                                       # best.pt: verified, on its device, in eval mode
    for part in predict(saved.network, source, saved.config.data.image_size, crops=144, indices=range(done, total)):
        parts.append(part); done += len(part)                       # may be stopped or saved here
    Predictions.concatenate(parts).score.accuracy                   # of one network
    Predictions.mean(of_each_network).score.accuracy                # of an ensemble

Each row belongs to one of `indices`, so the probabilities of several networks can be averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from batchnorm.data.corrupt import Corrupt
from batchnorm.data.crops import multi_crop, single_crop
from batchnorm.data.processes import Processes
from batchnorm.data.source import Source, Unreadable
from batchnorm.graph.modules import keeps_statistics
from batchnorm.training import checkpoint, toml
from batchnorm.training.checkpoint import CheckpointError
from batchnorm.training.config import Config
from batchnorm.training.network import NetworkError, build
from batchnorm.training.score import Score, probabilities

Crops = Literal[1, 144]
Statistics = Literal["population", "moving", "average"]
CROPS: dict[Crops, Callable[[int], Callable[[Tensor], Tensor]]] = {1: single_crop, 144: multi_crop}
STATISTICS: dict[Statistics, str] = {
    "population": "Algorithm 2",
    "moving": "moving averages",
    "average": "averaged weights, Algorithm 2",
}

_REQUIRED_KEYS = {"config", "classes", "channels", "step", "population", "moving"}
_ADVICE = "give a run's folder, or best.pt or final.pt of its checkpoints"
_UNREADABLE = -1


@dataclass(frozen=True)
class SavedNetwork:
    """A network of `batchnorm train`, in evaluation mode, as it was after `step` steps.

    network: takes images as `transform` makes them, (N, channels, S, S) of its weights' dtype, and returns logits,
        (N, classes).
    class_names: of each class, in the order of the logits; numbers where the data set had no names.
    """

    path: Path
    network: nn.Module
    config: Config
    classes: int
    channels: int
    step: int
    class_names: tuple[str, ...] = ()

    @property
    def transform(self) -> Callable[[Tensor], Tensor]:
        """What makes an image, uint8 (channels, H, W), ready for the network: (channels, S, S) in [-1, 1].

        On the device and in the dtype of its weights.
        """
        crop, weight = single_crop(self.config.data.image_size), next(self.network.parameters())
        return lambda image: crop(image).to(weight.device, weight.dtype)

    @property
    def has_norms(self) -> bool:
        """Whether it has BN, so that the choice of statistics matters."""
        return keeps_statistics(self.network)

    def predictions(
        self, source: Source, crops: Crops, corrupt: Corrupt, on_part: Callable[[int], None], loaders: int = 0
    ) -> Predictions:
        """Those on all images of `source`, see `predict`; `on_part` is told the number of images of each part."""
        parts = []
        for part in predict(
            self.network,
            source,
            self.config.data.image_size,
            crops=crops,
            batch_size=self.config.evaluation.batch_size,
            corrupt=corrupt,
            loaders=loaders,
        ):
            parts.append(part)
            on_part(len(part))
        return Predictions.concatenate(parts)

    def expect(self, source: Source, name: str) -> None:
        """Raise NetworkError unless `source`, the data set `name`, has the channels and classes of the training set."""
        given, expected = (_describe(each.channels, each.classes) for each in (source, self))
        if given != expected:
            raise NetworkError(
                f"{self.path} was trained on {expected}, {name} has {given}: choose other data"
            )


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of images, and their labels.

    probabilities: (n, classes) float32; NaN for an image that could not be read.
    labels: (n,) int64; -1 for an image that could not be read.
    """

    probabilities: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def score(self) -> Score:
        """The score over the images that could be read."""
        read = self.labels != _UNREADABLE
        return Score.of(self.probabilities[read], self.labels[read])

    @classmethod
    def concatenate(cls, parts: Iterable[Predictions]) -> Predictions:
        """The predictions of one network on the images of all `parts`."""
        parts = list(parts)
        return cls(
            torch.cat([part.probabilities for part in parts]), torch.cat([part.labels for part in parts])
        )

    @classmethod
    def mean(cls, networks: Sequence[Predictions]) -> Predictions:
        """The predictions of an ensemble: the arithmetic mean of the networks' probabilities (section 4.2.3)."""
        total = torch.zeros_like(networks[0].probabilities)
        for network in networks:
            total += network.probabilities
        return cls(total / len(networks), torch.stack([network.labels for network in networks]).amin(0))


def load(run: str | Path, statistics: Statistics = "population") -> SavedNetwork:
    """The best network of a run of `batchnorm train`, for use in Python.

    Args:
        run: the run's folder, or a best.pt or final.pt of its checkpoints.
        statistics: those by which BN normalises: "population" (Algorithm 2), "moving" (the moving averages of
            training), or "average" for the average of the weights (training.ema) with its own statistics.

    Returns:
        The network in evaluation mode, on the accelerator if there is one and its configuration allows it, with its
        configuration, the names of its classes and the transform of its images.

    Raises:
        NetworkError: there is no such file, or it is broken or of another kind.

    Example::

        import batchnorm.training

        saved = batchnorm.training.load("runs/train-20260101-120000")
        image = torchvision.io.decode_image("cat.jpg", "RGB")          # uint8 (3, H, W)
        with torch.inference_mode():
            probabilities = saved.network(saved.transform(image)[None]).softmax(1)
        print(saved.class_names[probabilities.argmax()])
    """
    return load_network(network_file(Path(run)), statistics)


def network_file(place: Path, name: str = "best.pt") -> Path:
    """The file of a network: `place` itself or, if it is a run's folder, checkpoints/`name`. Raises: NetworkError."""
    path = place / "checkpoints" / name if place.is_dir() else place
    if not path.is_file():
        what = f"{place} holds no checkpoints/{name}" if place.is_dir() else f"there is no file {path}"
        raise NetworkError(f"{what}: {_ADVICE}")
    return path


def load_network(path: Path, statistics: Statistics = "population") -> SavedNetwork:
    """The network in a best.pt or final.pt, on the accelerator if there is one and its configuration allows it.

    statistics: those that BN uses: "population" (Algorithm 2) or "moving" (the moving averages of training). "average"
        loads the moving average of the weights (training.ema) with its own statistics of Algorithm 2.

    Raises: NetworkError for a file that is broken or of another kind.
    """
    try:
        state = checkpoint.load(path) or {}
    except (CheckpointError, OSError):
        raise NetworkError(f"{path} is broken, or no file of batchnorm train: {_ADVICE}") from None
    if not state.keys() >= _REQUIRED_KEYS:
        raise NetworkError(f"{path} holds no network for evaluation: {_ADVICE}")
    if state.get(statistics) is None:
        raise NetworkError(f"{path} holds no averaged weights: it was trained without training.ema")
    try:
        config = toml.parse(state["config"])
        network = build(config, state["classes"], state["channels"])
        if config.training.precision == "float64":
            network = network.double()
        network.load_state_dict(state[statistics])
    except (toml.ConfigError, NetworkError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise NetworkError(f"{path} was written by another version of batchnorm: {reason}") from None
    if config.machine.device == "auto" and torch.accelerator.is_available():
        network = network.to(torch.accelerator.current_accelerator())
    network = network.to(memory_format=torch.channels_last)
    classes = state["classes"]
    names = state.get(
        "class_names", [str(number) for number in range(classes)]
    )  # earlier versions saved none
    if (
        not isinstance(names, list)
        or len(names) != classes
        or not all(isinstance(each, str) for each in names)
    ):
        raise NetworkError(f"{path} has {classes} classes and other names: {_ADVICE}")
    return SavedNetwork(path, network.eval(), config, classes, state["channels"], state["step"], tuple(names))


def predict(
    network: nn.Module,
    source: Source,
    image_size: int,
    *,
    crops: Crops = 1,
    indices: Sequence[int] | None = None,
    batch_size: int = 250,
    corrupt: Corrupt | None = None,
    loaders: int = 0,
) -> Iterator[Predictions]:
    """The predictions of `network` on images of `source`, in parts of max(1, batch_size // crops) images.

    crops: number of crops of each image, of image_size pixels; their probabilities are averaged.
    indices: of the images, in this order; unless given, all. A second call with the remaining indices, after whole
        parts, gives the same numbers as one call.
    batch_size: crops per forward pass.
    corrupt: counts the images that cannot be read; unless given, none may be unreadable.
    loaders: loader processes for single crops; 144 crops are too large to be sent between processes.

    Raises: DataError for images that cannot be read; ValueError for a network that is not in evaluation mode.
    """
    if network.training:
        raise ValueError("the network is in training mode, its BN would use the batch: call network.eval()")
    corrupt = Corrupt(0, len(source)) if corrupt is None else corrupt
    indices = range(len(source)) if indices is None else indices
    images = max(1, batch_size // crops)
    requests = [indices[at : at + images] for at in range(0, len(indices), images)]
    reader = _Reader(source, CROPS[crops](image_size))
    answers = Processes(reader, requests, loaders if crops == 1 else 0)
    return _predictions(network, answers, source.classes, batch_size, corrupt)


@dataclass(frozen=True)
class _Images:
    """Crops and labels of the images at `positions` of a request; `unreadable` has the reasons for the others."""

    requested: int
    positions: list[int]
    crops: list[Tensor]
    labels: list[int]
    unreadable: dict[str, str]


@dataclass(frozen=True)
class _Reader:
    """Reads the images of a request, in a loader process or in this one."""

    source: Source
    crop: Callable[[Tensor], Tensor]

    def __call__(self, indices: Sequence[int]) -> _Images:
        images = _Images(len(indices), [], [], [], {})
        for position, index in enumerate(indices):
            try:
                image, label = self.source[index]
            except Unreadable as error:
                images.unreadable[error.name] = error.why
                continue
            images.positions.append(position)
            images.crops.append(self.crop(image))
            images.labels.append(label)
        return images


def _predictions(
    network: nn.Module, answers: Iterable[_Images], classes: int, batch_size: int, corrupt: Corrupt
) -> Iterator[Predictions]:
    for images in answers:
        corrupt.add(images.unreadable)
        rows = torch.full((images.requested, classes), torch.nan)
        labels = torch.full((images.requested,), _UNREADABLE)
        if images.positions:
            rows[images.positions] = _mean_over_crops(network, torch.stack(images.crops), batch_size)
            labels[images.positions] = torch.tensor(images.labels)
        yield Predictions(rows, labels)


@torch.inference_mode()
def _mean_over_crops(network: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Mean probabilities of images, (N, C, S, S), or of all their crops, (N, crops, C, S, S), as one large batch."""
    weight = next(network.parameters())
    parts = [
        probabilities(network, part.to(weight.device, weight.dtype, memory_format=torch.channels_last))
        for part in images.flatten(0, -4).split(batch_size)
    ]
    per_image: Tensor = torch.cat(parts).unflatten(0, (len(images), -1))
    return per_image.mean(1).float().cpu()


def _describe(channels: int, classes: int) -> str:
    return f"images of {channels} channel{'s' * (channels > 1)} in {classes} classes"
