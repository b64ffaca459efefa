"""How a model is called while it is examined: the model inside of wrappers, the batches, the modes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.calibrate.batches import Forward, call_model
from batchnorm.diagnostics.intact import intact
from batchnorm.graph.modules import is_compiled

_SIZES = (64, 224, 32, 128, 299, 256, 384)
_WRAPPERS = ("DistributedDataParallel", "DataParallel")


class Runs:
    """A model, batches for it, and the ways to run it that leave it as it was.

    model: that is called: what DDP, DataParallel or torch.compile has wrapped.
    prefix: of the paths in the user's model.
    batches: the first of what was given, and the last, where that is known.
    forward: called with model and batch.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Any] | None, forward: Forward | None, limit: int
    ) -> None:
        self.whole = model
        self.model, self.prefix = unwrapped(model)
        self.forward = forward or self._on_its_device
        self.batches = [] if batches is None else _some(batches, limit)

    def path(self, path: str) -> str:
        """A path of the inner model as one of the user's."""
        return ".".join(filter(None, (self.prefix, path)))

    def call(self, batch: Any, with_gradients: bool = False) -> Any:
        """The model's output of a batch, which stays as it is, whatever the model does to its input.

        with_gradients: whether the input has gradients too, without which checkpointing may have none to pass on.
        """
        return self.forward(self.model, tree_map(_differentiable if with_gradients else _fresh, batch))

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """Whatever happens inside, the model is as it was afterwards; compiled parts run uncompiled."""
        with intact(self.whole), torch.inference_mode(False), eagerly(self.model):
            yield

    def called(self, layers: Mapping[str, nn.Module]) -> set[str]:
        """The paths of the layers that are called in evaluation; of all, where that is not known."""
        found: set[str] = set()

        def hook_of(path: str) -> Any:
            return lambda *_: found.add(path)

        try:
            example = self.example()
            with self.unharmed(), torch.no_grad():
                self.model.eval()
                for path, layer in layers.items():
                    layer.register_forward_pre_hook(hook_of(path))  # taken away again by unharmed()
                self.call(example)
        except Exception:
            return set(layers)
        return found or set(layers)

    def example(self) -> Any:
        """A small batch: the first two examples of the first one, or a made-up one. Raises: ValueError."""
        if self.batches:
            return self._smaller(self.batches[0])
        return self._made_up()

    def _on_its_device(self, model: nn.Module, batch: Any) -> Any:
        device = next((each.device for each in model.parameters()), torch.device("cpu"))
        return call_model(
            model, tree_map(lambda each: each.to(device) if isinstance(each, Tensor) else each, batch)
        )

    def _smaller(self, batch: Any) -> Any:
        if examples(batch) <= 2:
            return batch
        small = tree_map(lambda each: each[:2] if isinstance(each, Tensor) else each, batch)
        return small if self._takes(small) else batch

    def _takes(self, batch: Any) -> bool:
        try:
            with self.unharmed(), torch.no_grad():
                self.model.eval()
                self.call(batch)
        except Exception:
            return False
        return True

    def _made_up(self) -> Any:
        for batch in _candidates(self.model):
            if self._takes(batch):
                return batch
        raise ValueError("what it takes is not known: give batches, examine(model, loader)")


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The model that others have wrapped, and the path to it."""
    path: list[str] = []
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model, name = model._orig_mod, "_orig_mod"
        elif type(model).__name__ in _WRAPPERS or isinstance(model, torch.optim.swa_utils.AveragedModel):
            model, name = model.module, "module"  # type: ignore[assignment]
        else:
            return model, ".".join(path)
        path.append(name)


def tensors(batch: Any) -> list[Tensor]:
    return [each for each in tree_leaves(batch) if isinstance(each, Tensor)]


def examples(batch: Any) -> int:
    """How many examples all tensors of a batch have; 0 where they differ."""
    sizes = {each.shape[0] if each.dim() else 0 for each in tensors(batch)}
    return sizes.pop() if len(sizes) == 1 else 0


def _some(batches: Iterable[Any], limit: int) -> list[Any]:
    if isinstance(batches, Sequence) and len(batches) > limit:
        return [*batches[: limit - 1], batches[-1]]  # the last one may be smaller
    if isinstance(batches, Tensor | Mapping):
        raise TypeError(
            f"batches must be a list or a loader of batches, got one {type(batches).__name__}: [batch]"
        )
    return list(islice(batches, limit))


def _fresh(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _differentiable(value: Any) -> Any:
    value = _fresh(value)
    return value.requires_grad_() * 1 if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Let what is compiled in it run uncompiled, so that its layers are called."""
    if any(map(is_compiled, model.modules())):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _candidates(model: nn.Module) -> Iterator[Any]:
    """Batches of two random examples that a network with such a first layer may take."""
    generator = torch.Generator().manual_seed(0)
    parameter = next(model.parameters(), torch.zeros(()))
    kind, device = parameter.dtype, parameter.device

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device, kind)

    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            dims, channels = len(module.kernel_size), module.in_channels
            for size in _SIZES:
                yield random(2, channels, *([16] if dims == 3 else []), *[size] * min(dims, 2))
            if dims == 2:  # detection
                yield ([random(channels, 96, 96) for _ in range(2)],)
            return
        if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            for size in (1, 4, 8):
                yield random(2, module.in_channels, *[size] * len(module.kernel_size))
            return
        if isinstance(module, nn.Linear):
            for shape in ((2,), (2, 16)):
                yield random(*shape, module.in_features)
            side = round((module.in_features / 3) ** 0.5)
            for shape in ((1, round(module.in_features**0.5)), (3, side)):
                if shape[0] * shape[1] ** 2 == module.in_features:
                    yield random(2, shape[0], shape[1], shape[1])
            return
        if isinstance(module, nn.Embedding):
            for length in ((16,), (64,), ()):
                yield torch.randint(module.num_embeddings, (2, *length), generator=generator).to(device)
            return
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for sizes in ((), (16,), (64, 64), (8, 16, 16)):
                yield random(2, int(module.num_features), *sizes)
            return
