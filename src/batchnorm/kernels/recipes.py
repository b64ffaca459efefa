"""What a forward pass saves for its backward pass: tensors, and recipes by which others are made again.

The output of a normalisation is one pass over its input away, and its node saves that input anyway. While a `Recording`
is active, whoever computes such a tensor says how (`add`); where autograd then saves it, or a view of it, a recipe is
saved in its place, and unpacking makes the tensor again: the same bits, by the same kernel.

A tensor is known by its storage and its version, so views are found and a change in place is not taken for the value
before it. A recipe's sources are saved in the same way, and may be recipes themselves.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

Make = Callable[..., Tensor]  # the tensor, from those of the sources
# So many recipes, each of which needs the one before, are made and held at once; of more, about twice the root.
_CHAIN = 8
_PURGED = 256  # entries, after which those of tensors that are gone are dropped
_PLAIN = (Tensor, nn.Parameter)

_threads = threading.local()


class View(NamedTuple):
    """What of a storage a tensor is."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        return cls(tensor.size(), tensor.stride(), int(tensor.storage_offset()))


class Saved:
    """A tensor that the backward pass may ask for: itself, or a recipe and what of its result it is."""

    __slots__ = ("recipe", "round", "tensor", "version", "view")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.version = tensor._version
        self.recipe: Recipe | None = None
        self.view: View | None = None
        self.round = 0

    def become(self, recipe: Recipe) -> None:
        """Let go of the tensor; from now on `recipe` makes it."""
        assert self.tensor is not None
        self.view = View.of(self.tensor)
        self.recipe, self.tensor = recipe, None
        self.round = recipe.round
        recipe.users += 1
        recipe.waiting += 1

    def is_of(self, storage: torch.UntypedStorage, output: Tensor) -> bool:
        """Whether it keeps what `output`, in `storage`, is now."""
        tensor = self.tensor
        return (
            tensor is not None
            and tensor.untyped_storage()._cdata == storage._cdata
            and self.version == output._version
            and tensor.dtype == output.dtype
        )

    def get(self) -> Tensor:
        """The tensor.

        Raises: RuntimeError, as torch's, where it was changed in place since; autograd does not look at hooked ones.
        """
        if self.recipe is not None:
            return self.take(self.recipe.value())
        assert self.tensor is not None
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self.tensor.type()} {list(self.tensor.shape)}] is at version {self.tensor._version}; expected "
                f"version {self.version} instead. It was saved under bn.save_memory, by an operation or as what one of "
                "its outputs is made again from: change a clone of it, or not in place"
            )
        return self.tensor

    def take(self, base: Tensor) -> Tensor:
        """The tensor as a part of `base`, what the recipe has made; it may have been the last one to wait for that."""
        assert self.recipe is not None and self.view is not None
        if self.round == self.recipe.round:
            self.round += 1
            self.recipe.one_less()
        if self.view.size == base.size() and self.view.stride == base.stride() and not self.view.offset:
            return base
        return base.as_strided(*self.view)

    def __del__(self) -> None:
        recipe: Recipe | None = getattr(self, "recipe", None)  # a compiler's stand-in has none
        if recipe is not None:
            recipe.users -= 1
            if self.round == recipe.round:
                recipe.one_less()


class Recipe:
    """How a tensor is made again, from what.

    What was made stays until each of those who saved it has had it once. A graph that is retained may be walked again:
    that is another round.
    """

    __slots__ = ("depth", "dtype", "made", "make", "round", "sources", "users", "view", "waiting")

    def __init__(self, output: Tensor, make: Make, sources: Sequence[Saved]) -> None:
        self.view = View.of(output)
        self.dtype = output.dtype
        self.make, self.sources = make, sources
        self.depth: int = 1 + max(
            (each.recipe.depth for each in sources if each.recipe is not None), default=0
        )
        self.made: Tensor | None = None
        self.users = self.waiting = self.round = 0

    def one_less(self) -> None:
        self.waiting -= 1
        if self.waiting <= 0:
            self.made, self.waiting = None, self.users
            self.round += 1

    def value(self) -> Tensor:
        """The tensor, made if it is not there, and what it is made from before it."""
        if self.made is not None:
            return self.made
        if all(each.recipe is None or each.recipe.made is not None for each in self.sources):
            with torch.no_grad():
                made = self._from({})
            self.made = made if self.waiting > 1 else None
            return made
        missing = _missing(self)
        last = {id(source.recipe): number for number, each in enumerate(missing) for source in each.sources}
        stays = _staying(missing)
        values: dict[int, Tensor] = {}
        with torch.no_grad():
            for number, recipe in enumerate(missing):
                values[id(recipe)] = made = recipe._from(values)
                if recipe.waiting and stays(recipe):
                    recipe.made = made
                for source in recipe.sources:
                    if last[id(source.recipe)] == number:
                        values.pop(id(source.recipe), None)
        return values[id(self)]

    def _from(self, values: dict[int, Tensor]) -> Tensor:
        made = self.make(
            *(
                source.take(values[id(source.recipe)]) if id(source.recipe) in values else source.get()
                for source in self.sources
            )
        )
        if made.stride() != self.view.stride:  # a view of it is taken by strides
            made = torch.empty_strided(*self.view[:2], dtype=made.dtype, device=made.device).copy_(made)
        return made


def _missing(top: Recipe) -> list[Recipe]:
    """The recipes that must be followed for `top`, in order; without recursion, for a chain may be long."""
    order: dict[Recipe, None] = {}
    stack = [(top, False)]
    while stack:
        recipe, ready = stack.pop()
        if recipe in order:
            continue
        if ready:
            order[recipe] = None
            continue
        stack.append((recipe, True))
        for source in recipe.sources:
            if source.recipe is not None and source.recipe.made is None:
                stack.append((source.recipe, False))
    return list(order)


def _staying(missing: Sequence[Recipe]) -> Callable[[Recipe], bool]:
    """Which of these to hold: the end of a long chain, which is asked for next, and some to begin from again."""
    deepest = missing[-1].depth
    length = deepest - min(recipe.depth for recipe in missing) + 1
    if length <= _CHAIN:
        return lambda recipe: True
    apart = math.isqrt(length - 1) + 1
    return lambda recipe: recipe.depth > deepest - apart or (deepest - recipe.depth) % apart == 0


class _Entry(NamedTuple):
    storage: StorageWeakRef  # as long as this lives, no other storage has the same identity
    version: int
    recipe: Recipe


class Recording:
    """A forward pass in which tensors are saved as recipes, as far as they are known."""

    def __init__(self, owner: object = None) -> None:
        self.owner = owner
        self.close: Callable[[], None]  # what ends it, and all that was entered with it
        self._entries: dict[int, _Entry] = {}
        self._limit = _PURGED
        self._hooks = saved_tensors_hooks(self.pack, Saved.get)
        self.packed: list[Saved] | None = None  # what is being saved, for `watch`

    def __enter__(self) -> Recording:
        self._before = active()
        _threads.recording = self
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        _threads.recording = self._before
        self._entries.clear()

    def recipe_of(self, tensor: Tensor) -> Recipe | None:
        """What makes the storage of `tensor`, as it is now."""
        if type(tensor) not in _PLAIN or tensor.layout != torch.strided or not torch._C._has_storage(tensor):
            return None
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        if entry is None or entry.version != tensor._version or entry.recipe.dtype != tensor.dtype:
            return None
        return entry.recipe

    def pack(self, tensor: Tensor) -> Saved:
        """What is saved in place of `tensor`."""
        saved = Saved(tensor)
        watching = getattr(_threads, "watching", None)
        if watching is not None:
            watching.append(saved)
        recipe = self.recipe_of(tensor)
        if recipe is not None:
            saved.become(recipe)
        elif self.packed is not None:
            self.packed.append(saved)
        return saved

    def source(self, tensor: Tensor) -> Saved:
        """As `pack`, for a tensor that is made again from."""
        return self.pack(tensor.detach())

    def add(self, output: Tensor, make: Make, sources: Sequence[Saved]) -> None:
        """`output` is `make(*sources)`, of which nothing else is kept.

        Nothing is noted of an output that does not fill its storage.
        """
        if type(output) not in _PLAIN or output.layout != torch.strided or not torch._C._has_storage(output):
            return
        storage = output.untyped_storage()
        if storage.nbytes() != output.numel() * output.itemsize or not output.numel():
            return
        if len(self._entries) >= self._limit:
            self._purge()
        recipe = Recipe(output, make, sources)
        self._entries[storage._cdata] = _Entry(StorageWeakRef(storage), output._version, recipe)
        for saved in self.packed or ():  # by the operation itself, before it could be noted
            if saved.is_of(storage, output):
                saved.become(recipe)

    def _purge(self) -> None:
        self._entries = {key: entry for key, entry in self._entries.items() if not entry.storage.expired()}
        self._limit = max(_PURGED, 2 * len(self._entries))


def active() -> Recording | None:
    """The recording in which this thread computes."""
    return getattr(_threads, "recording", None)


@contextmanager
def watched(found: list[Saved]) -> Iterator[None]:
    """Append to `found` what recordings of this thread save; and let them record, though the caller has hooks."""
    before, _threads.watching = getattr(_threads, "watching", None), found
    try:
        yield
    finally:
        _threads.watching = before


def watching() -> bool:
    """Whether this thread is within `watched`."""
    return getattr(_threads, "watching", None) is not None


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of the storages behind `tensors`, each once."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in found}
