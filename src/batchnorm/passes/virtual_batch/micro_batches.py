"""Micro-batches with the statistics and the gradients of one batch, to rounding."""

from __future__ import annotations

import contextvars
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm.calibrate.batches import Forward, call_model
from batchnorm.graph.modules import is_ours, layers_of
from batchnorm.layers import _BatchNorm
from batchnorm.passes.virtual_batch.lockstep import Lockstep
from batchnorm.passes.virtual_batch.together import together

_ARGUMENTS = ("input", "residual", "mask")


@contextmanager
def virtual_batch(
    model: nn.Module,
    micro_batches: Iterable[Any],
    *,
    forward: Forward | None = None,
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

    Raises:
        ValueError: there are no micro-batches, or layers of torch's, which see one micro-batch at a time.
        RuntimeError: micro-batches take different ways through the model, or the model is called in the block with what
            was none of them.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), bn.BatchNorm1d(8), torch.nn.Sigmoid())
        >>> x = torch.randn(16, 4)
        >>> model(x).mean().backward()
        >>> of_one_batch = model[0].weight.grad.clone()
        >>> model.zero_grad()
        >>> inputs = x.split(4)
        >>> with bn.virtual_batch(model, inputs):
        ...     for part in inputs:
        ...         (model(part).mean() / len(inputs)).backward()
        >>> torch.allclose(model[0].weight.grad, of_one_batch, atol=1e-6)
        True
    """
    batches = list(micro_batches)
    if not batches:
        raise ValueError("virtual_batch needs at least one micro-batch")
    layers = layers_of(model)
    others = [
        name or "the model itself" for name, layer in layers.items() if layer.training and not is_ours(layer)
    ]
    if others:
        raise ValueError(
            f"{', '.join(others)}: layers of torch's, and those with a forward of their own, see one micro-batch at a "
            "time; bn.upgrade(model) first, whose report says what it leaves alone and why"
        )
    our_layers = {layer for layer in layers.values() if is_ours(layer)}
    calls = [_Call() for _ in batches]
    lockstep = Lockstep(len(batches))
    with ExitStack() as patches:
        for layer in our_layers:
            patches.enter_context(_patch_forward(layer, _gather(layer, layer.forward, lockstep)))
        patches.enter_context(_patch_forward(model, _record(model.forward, calls, lockstep)))
        lockstep.run([_task(model, batch, forward or call_model, offload) for batch in batches])
    for call in calls:
        call.detach()
    with _patch_forward(model, _replay(calls)):
        yield [call.detached_output for call in calls]
    gradients = [
        (attached, leaf.grad) for call in calls for attached, leaf in call.detached if leaf.grad is not None
    ]
    with ExitStack() as patches:
        for layer in our_layers:
            patches.enter_context(_patch_forward(layer, _raise_on_recomputation))
        if gradients:
            torch.autograd.backward(
                [attached for attached, _ in gradients], [gradient for _, gradient in gradients]
            )


@contextmanager
def _patch_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
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
    """A call of the model with a micro-batch, its output, and a detached output for use in the block."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    output: Any = None
    detached_output: Any = None
    replayed_before = False

    def detach(self) -> None:
        if self.arguments is None:
            raise RuntimeError(
                "`forward` did not call the model, or only parts of it, whose outputs virtual_batch does not see: "
                "hand it a model whose own call is all that is needed"
            )
        self.detached: list[tuple[Tensor, Tensor]] = []

        def detach(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            leaf = value.detach().requires_grad_()
            self.detached.append((value, leaf))
            return leaf

        self.detached_output = pytree.tree_map(detach, self.output)

    def matches(self, arguments: object, same: Callable[[Tensor, Tensor], bool]) -> bool:
        """Whether the tensors in `arguments` are the `same` as those of the recorded call."""
        recorded, given = (
            [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
            for values in (self.arguments, arguments)
        )
        return len(recorded) == len(given) and all(map(same, recorded, given))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _record(forward: Callable[..., Any], calls: list[_Call], lockstep: Lockstep) -> Callable[..., Any]:
    def record(*arguments: Any, **named: Any) -> Any:
        call = calls[lockstep.index()]
        output = forward(*arguments, **named)
        call.arguments, call.output = (arguments, named), output
        return output

    return record


def _replay(calls: list[_Call]) -> Callable[..., Any]:
    def replay(*arguments: Any, **named: Any) -> Any:
        # each of several equal micro-batches is replayed once before one is replayed again
        for replayed_before, same, call in product((False, True), (operator.is_, _equal), calls):
            if call.replayed_before == replayed_before and call.matches((arguments, named), same):
                call.replayed_before = True
                return call.detached_output
        raise RuntimeError(
            "within virtual_batch the model answers for its micro-batches, and this input is none of them: "
            "hand virtual_batch exactly what the model will be called with"
        )

    return replay


def _raise_on_recomputation(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError(
        "a layer of a virtual batch was called in the backward pass, which activation checkpointing does: "
        "it would see one micro-batch alone; instead of checkpointing use virtual_batch(..., offload=True)"
    )


def _task(model: nn.Module, batch: Any, forward: Forward, offload: bool) -> Callable[[], None]:
    """The forward pass of one micro-batch, to run in another thread with the torch settings of this one."""
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


def _gather(layer: _BatchNorm, forward: Callable[..., Tensor], lockstep: Lockstep) -> Callable[..., Tensor]:
    def gather_parts(*arguments: Any, **named: Any) -> Tensor:
        part = dict(zip(_ARGUMENTS, arguments, strict=False)) | named
        return lockstep.gather(layer, part, partial(together, layer, forward))

    return gather_parts
