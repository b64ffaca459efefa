"""Micro-batches that are one batch: the same statistics and the same gradients, to rounding."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm.layers import _BatchNorm
from batchnorm.moments import positions
from batchnorm.passes import batches as of_batches
from batchnorm.passes.swap import is_ours, layers_of
from batchnorm.statistics import Population, Renorm, Sync

_ARGUMENTS = ("input", "residual", "mask")


@contextmanager
def virtual_batch(
    model: nn.Module,
    micro_batches: Iterable[Any],
    *,
    forward: of_batches.Forward | None = None,
    offload: bool = False,
) -> Iterator[list[Any]]:
    """Let `micro_batches` be one batch to every batch normalization of `model`.

        with bn.virtual_batch(model, inputs):
            for x, target in zip(inputs, targets):
                loss = criterion(model(x), target) / len(inputs)
                loss.backward()
        optimizer.step()

    The loop is that of gradient accumulation; the gradients afterwards are those of one batch of all samples, which
    accumulation alone does not give where layers look at the batch. Two passes: on entering, all micro-batches go
    through the model side by side, a thread each, one at a time, and wait for each other at every layer, which
    normalises them together. `model(x)` in the block finds the output of that pass. On leaving, what the losses
    asked of these outputs goes back through all of it at once. A backward pass needs every micro-batch's
    activations, however they are ordered: memory is that of the one large batch (but for what a layer needs while it
    works, and for `offload`), time a little more than its.

    The micro-batches may differ in the number of samples and, unless statistics go by groups of samples or single
    activations, in the size of their images.

    Args:
        model: in training; its batch normalization must be ours (`bn.upgrade`).
        micro_batches: inputs: tensors, tuples whose first is the input, or mappings of arguments. All are read on
            entering.
        forward: called with model and micro-batch, where that is not how the model is called.
        offload: keep what the backward pass needs in the memory of the CPU, so that an accelerator holds one
            micro-batch's at a time.

    Yields: the model's outputs, in order; those in the block, whose gradients are taken on leaving.

    Raises: ValueError for no micro-batches and for layers of torch's, which see one micro-batch at a time;
        RuntimeError when micro-batches take different ways through the model, or when the model is called in the
        block with what was none of them.
    """
    batches = list(micro_batches)
    if not batches:
        raise ValueError("virtual_batch needs at least one micro-batch")
    layers = layers_of(model)
    foreign = [
        name or "the model itself" for name, layer in layers.items() if layer.training and not is_ours(layer)
    ]
    if foreign:
        raise ValueError(
            f"{', '.join(foreign)}: layers of torch's see one micro-batch at a time; bn.upgrade(model) first"
        )
    joint = {layer for layer in layers.values() if is_ours(layer)}
    calls = [_Call() for _ in batches]
    lockstep = _Lockstep(len(batches))
    with ExitStack() as patches:
        for layer in joint:
            patches.enter_context(_patched(layer, _meet(layer, layer.forward, lockstep)))
        patches.enter_context(_patched(model, _record(model.forward, calls, lockstep)))
        lockstep.run([_task(model, batch, forward or of_batches.call, offload) for batch in batches])
    for call in calls:
        call.cut()
    with _patched(model, _replay(calls)):
        yield [call.shown for call in calls]
    asked = [(true, cut.grad) for call in calls for true, cut in call.cuts if cut.grad is not None]
    with ExitStack() as patches:
        for layer in joint:
            patches.enter_context(_patched(layer, _recomputed))
        if asked:
            torch.autograd.backward([true for true, _ in asked], [gradient for _, gradient in asked])


@contextmanager
def _patched(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class _Call:
    """A call of the model with a micro-batch, and its output, cut off from the graph for the block to work on."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    output: Any = None
    shown: Any = None

    def cut(self) -> None:
        if self.arguments is None:
            raise RuntimeError(
                "`forward` did not call the model, or only parts of it, whose outputs virtual_batch does not see: "
                "hand it a model whose own call is all that is needed"
            )
        self.cuts: list[tuple[Tensor, Tensor]] = []

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            leaf = value.detach().requires_grad_()
            self.cuts.append((value, leaf))
            return leaf

        self.shown = pytree.tree_map(cut, self.output)

    def is_of(
        self, arguments: tuple[tuple[Any, ...], dict[str, Any]], same: Callable[[Any, Any], bool]
    ) -> bool:
        mine, theirs = (pytree.tree_flatten(each) for each in (self.arguments, arguments))
        return mine[1] == theirs[1] and all(map(same, mine[0], theirs[0]))


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return _same(a, b)


def _record(forward: Callable[..., Any], calls: list[_Call], lockstep: _Lockstep) -> Callable[..., Any]:
    def recorded(*arguments: Any, **named: Any) -> Any:
        call = calls[lockstep.place()]
        output = forward(*arguments, **named)
        call.arguments, call.output = (arguments, named), output
        return output

    return recorded


def _replay(calls: list[_Call]) -> Callable[..., Any]:
    def replayed(*arguments: Any, **named: Any) -> Any:
        for same in (_same, _equal):
            for call in calls:
                if call.is_of((arguments, named), same):
                    return call.shown
        raise RuntimeError(
            "within virtual_batch the model answers for its micro-batches, and this input is none of them: "
            "hand virtual_batch exactly what the model will be called with"
        )

    return replayed


def _recomputed(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError(
        "a layer of a virtual batch was called in the backward pass, which activation checkpointing does: "
        "it would see one micro-batch alone; instead of checkpointing use virtual_batch(..., offload=True)"
    )


def _task(model: nn.Module, batch: Any, forward: of_batches.Forward, offload: bool) -> Callable[[], None]:
    """A pass of one micro-batch, for a thread of its own: with the settings of this one."""
    gradients, context = torch.is_grad_enabled(), contextvars.copy_context()
    autocast = [
        (device, torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]
    device = (
        torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    )

    def task() -> None:
        with ExitStack() as settings:
            settings.enter_context(torch.set_grad_enabled(gradients))
            for kind, dtype in autocast:
                settings.enter_context(torch.autocast(kind, dtype))
            if device is not None:
                settings.enter_context(torch.cuda.device(device))
            if offload:
                settings.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=device is not None))
            context.run(forward, model, batch)

    return task


def _meet(layer: _BatchNorm, forward: Callable[..., Tensor], lockstep: _Lockstep) -> Callable[..., Tensor]:
    def met(*arguments: Any, **named: Any) -> Tensor:
        return lockstep.meet(layer, forward, dict(zip(_ARGUMENTS, arguments, strict=False)) | named)

    return met


class _Stopped(BaseException):
    """Another thread failed."""


class _Lockstep:
    """Threads that take turns, and wait for each other at every layer."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._turn = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._at: list[tuple[_BatchNorm, dict[str, Any]] | None] = [None] * count
        self._found: tuple[Tensor, ...] = ()
        self._own = threading.local()
        self._left = count
        self._over = threading.Event()

    def place(self) -> int:
        """Which of the threads this is."""
        place: int = self._own.place
        return place

    def run(self, tasks: list[Callable[[], None]]) -> None:
        """Run each task in a thread; raise what the first that failed raised."""
        threads = [threading.Thread(target=self._run, args=each, daemon=True) for each in enumerate(tasks)]
        try:
            for thread in threads:
                thread.start()
            # Ctrl-C is lost to a wait without end that it comes just before, and makes a thread that is joined look
            # as if it had stopped (until Python 3.13)
            while not self._over.wait(0.1):
                pass
        except BaseException as error:  # nobody shall wait for a turn that does not come
            self._stop(error)
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.01)
            raise
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _run(self, place: int, task: Callable[[], None]) -> None:
        self._own.place = place
        try:
            self._wait_for_turn(place)
            task()
            if any(self._at):
                raise _apart()
            self._pass_on(place)
        except _Stopped:
            pass
        except BaseException as error:
            self._stop(error)
        finally:
            with self._changed:
                self._left -= 1
            if not self._left:
                self._over.set()

    def meet(self, layer: _BatchNorm, forward: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        """The layer's output for this thread's part of the batch, once all have come to it."""
        place = self.place()
        if any(at is not None and at[0] is not layer for at in self._at):
            raise _apart()
        self._at[place] = (layer, arguments)
        if place == self._count - 1:
            parts = [at[1] for at in self._at if at is not None]
            if len(parts) < self._count:
                raise _apart()
            self._found = _together(layer, forward, parts)
            self._at = [None] * self._count
        self._pass_on(place)
        self._wait_for_turn(place)
        return self._found[place]

    def _pass_on(self, place: int) -> None:
        with self._changed:
            self._turn = (place + 1) % self._count
            self._changed.notify_all()

    def _wait_for_turn(self, place: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == place or self._error is not None)
            if self._error is not None:
                raise _Stopped

    def _stop(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


def _apart() -> RuntimeError:
    return RuntimeError(
        "the micro-batches of a virtual batch took different ways through the model: "
        "its layers must be called in the same order for each"
    )


def _together(
    layer: _BatchNorm, forward: Callable[..., Tensor], parts: list[dict[str, Any]]
) -> tuple[Tensor, ...]:
    """The outputs of `layer` for the parts of one batch."""
    inputs: list[Tensor] = [part["input"] for part in parts]
    residuals, masks = ([part.get(name) for part in parts] for name in ("residual", "mask"))
    if any(mask is not None for mask in masks):  # then each has one
        masks = [
            torch.ones_like(x[:, :1], dtype=torch.bool) if mask is None else positions(mask, x)
            for mask, x in zip(masks, inputs, strict=True)
        ]
    if len({x.shape[1:] for x in inputs}) == 1:
        output = forward(torch.cat(inputs), _cat(residuals), _cat(masks))
        # copies, for what comes next may work in place
        return tuple(part.clone() for part in output.split([x.size(0) for x in inputs]))
    return _of_different_sizes(layer, inputs, residuals, masks)


def _of_different_sizes(
    layer: _BatchNorm, inputs: list[Tensor], residuals: list[Tensor | None], masks: list[Tensor | None]
) -> tuple[Tensor, ...]:
    """As rows: to moments over all positions it does not matter how these are arranged."""
    if layer.statistics is not None and not isinstance(layer.statistics, (Sync, Renorm, Population)):
        raise ValueError(f"micro-batches of different sizes cannot be joined for {layer.statistics!r}")
    if not isinstance(layer.num_features, int):
        raise ValueError(
            "micro-batches of different sizes cannot be joined where every activation has statistics of its own"
        )
    for x in inputs:
        layer._check_input_dim(x)
    rows = [
        _cat([None if value is None else _rows(value) for value in values])
        for values in (inputs, residuals, masks)
    ]
    assert rows[0] is not None
    output = layer._normalised(rows[0], rows[1], rows[2], layer.weight, layer.bias)
    parts = output.split([x.numel() // x.size(1) for x in inputs])
    return tuple(
        part.reshape(x.size(0), *x.shape[2:], x.size(1)).movedim(-1, 1).clone()
        for part, x in zip(parts, inputs, strict=True)
    )


def _rows(x: Tensor) -> Tensor:
    """(N, C, *S) as (N·|S|, C)."""
    return x.movedim(1, -1).flatten(0, -2)


def _cat(values: list[Tensor | None]) -> Tensor | None:
    there = [value for value in values if value is not None]
    return torch.cat(there) if there else None
