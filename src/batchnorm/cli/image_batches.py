"""Batches of a data set's images, as a named network takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from batchnorm.cli.named_model import NamedModel
from batchnorm.cli.terminal import Failure, as_failure

if TYPE_CHECKING:
    from torch import Tensor

DataOption = Annotated[
    str,
    typer.Option(
        help="The data set, named as in run.toml; its training split is used, in a random order.",
        show_default=False,
    ),
]
ImagesOption = Annotated[int | None, typer.Option(min=2, help="How many of its images.", show_default="all")]
BatchSizeOption = Annotated[int, typer.Option(min=2, help="Images in a batch.")]
SizeOption = Annotated[
    int | None, typer.Option(min=1, help="The side of an image, in pixels.", show_default="the network's own")
]
MeanOption = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B",
        help="The mean that is subtracted of pixels between 0 and 1, of each channel or of all.",
        show_default="torchvision's or timm's for the network, else 0.5",
    ),
]
StdOption = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B",
        help="The standard deviation by which they are divided then.",
        show_default="as of --mean",
    ),
]


class Batches:
    """Batches of images, (N, C, S, S); may be begun again.

    Raises: Failure for data or settings that cannot be used; while iterating, for images that cannot be read.
    """

    def __init__(
        self,
        named: NamedModel,
        data: str,
        images: int | None,
        batch_size: int,
        size: int | None,
        mean: str | None,
        std: str | None,
    ) -> None:
        from batchnorm.data.catalogue import load
        from batchnorm.data.idx import DataError
        from batchnorm.data.subset import Subset

        with as_failure(DataError, OSError):
            source = load(data, "train")
        size = size or named.size
        if size is None:
            raise Failure("the size of the network's images is not known: give --size PIXELS")
        if source.channels not in (1, named.channels):
            raise Failure(f"{data} has {source.channels} channels, and the network takes {named.channels}")
        self._source = Subset(source, min(images or len(source), len(source)))
        if len(self._source) < 2:
            raise Failure(f"{data} has {len(self._source)} training images: statistics need 2 at least")
        self._batch_size = batch_size
        self._dtype = named.dtype
        self._transform = partial(
            _prepared,
            size=size,
            channels=named.channels,
            mean=_numbers("--mean", mean, named.mean),
            std=_numbers("--std", std, named.std),
        )

    def __len__(self) -> int:
        return -(-len(self._source) // self._batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        from batchnorm.data.corrupt import Corrupt
        from batchnorm.data.idx import DataError
        from batchnorm.data.loader import SequentialLoader

        corrupt = Corrupt(0.01, len(self._source))
        with as_failure(DataError):
            for batch in SequentialLoader(self._source, self._transform, self._batch_size, corrupt):
                if len(batch.images) > 1:  # a last one of a single image may have no variance
                    yield batch.images.to(self._dtype)


def _prepared(image: Tensor, size: int, channels: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    import torch

    from batchnorm.data.crops import single_crop

    pixels = (single_crop(size)(image) + 1) / 2
    middle, width = (torch.tensor(each).view(-1, 1, 1) for each in (mean, std))
    return ((pixels.expand(channels, -1, -1) - middle) / width).contiguous()


def _numbers(option: str, given: str | None, own: Sequence[float]) -> list[float]:
    if given is None:
        return list(own)
    try:
        found = [float(each) for each in given.split(",")]
        if len(found) not in (1, 3) or (option == "--std" and min(found) <= 0):
            raise ValueError
    except ValueError:
        raise Failure(f"{option} {given}: write one number or three, as 0.485,0.456,0.406") from None
    return found
