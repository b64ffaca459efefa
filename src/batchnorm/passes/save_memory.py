"""`model, report = save_memory(model)`: outputs of batch normalization are made again in the backward pass."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import torch
from torch import nn

from batchnorm.graph.modules import is_compiled, is_ours, is_patched, normalizes
from batchnorm.kernels import recipes
from batchnorm.kernels.observers import captured, transformed
from batchnorm.kernels.recomputable import Watch
from batchnorm.passes.report import LayerReport, Report
from batchnorm.passes.rollback import unchanged_on_failure
from batchnorm.passes.swap import is_timm_s

M = TypeVar("M", bound=nn.Module)

_COMPILED = "is compiled: torch.compile decides what is kept, and makes cheap tensors again already"


def save_memory(model: M) -> tuple[M, Report]:
    """Let the training of `model` keep about half of its activations, in place, with the same gradients to the bit.

    A convolution, batch normalization and activation keep every activation twice: the layer keeps its input, the next
    convolution its output. From now on a forward pass of `model` keeps the input and 2·C numbers, and the backward
    pass makes the output again by the same kernel when it is first asked for, once, and lets it go with its last
    user. So too what is made of outputs by one pass over memory: activations (ReLU, SiLU, Hardswish, ...), residual
    sums, gates, padding, concatenation. No convolution is repeated and no random number drawn again.

    The classes of layers, their parameters, the state_dict and all results stay what they are. torch's own layers will
    do; `upgrade` before this makes the repetition cheaper: ours have the moments still, and the activation in the same
    pass. `downgrade` takes it back.

    It is in force where autograd saves tensors: while `model` or one of its children is called with gradients enabled.
    It steps aside where others decide what is saved: within torch.utils.checkpoint and other saved-tensor hooks, under
    torch.compile (with a warning), in exported and traced graphs and torch.func's transforms.

    Args:
        model: any module; a layer by itself is one too. In DistributedDataParallel or fully_shard before or after this.

    Returns: `model` itself, and a Report: the outcome for each layer, with the reason where its output is kept.

    Raises:
        TypeError: `model` is not a torch.nn.Module.

    Example:
        >>> import torch, batchnorm as bn
        >>> block = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)]
        >>> model, report = bn.upgrade(torch.nn.Sequential(*block))
        >>> model, report = bn.save_memory(model)
        >>> report
        1  recomputed  output, relu
        1 layer: 1 recomputed
    """
    if not isinstance(cast(object, model), nn.Module):
        raise TypeError(f"save_memory takes a torch.nn.Module, not {type(model).__name__}")
    compiled = {each for module in model.modules() if is_compiled(module) for each in module.modules()}
    layers = {name: each for name, each in model.named_modules() if normalizes(each)}
    outcomes = {name: _outcome(name, layer, layer in compiled) for name, layer in layers.items()}
    recomputed = {layers[name] for name, each in outcomes.items() if each.outcome == "recomputed"}
    with unchanged_on_failure(model):
        # children too, which may be called by themselves; not layers, which other tools leave alone if they have hooks
        modules: list[nn.Module] = [model, *(each for each in model.children() if each not in recomputed)]
        for module in modules:
            called = not isinstance(module, nn.ModuleList | nn.ModuleDict | torch.jit.ScriptModule)
            if called and module not in compiled and not recomputed.isdisjoint(module.modules()):
                _hook(module, module is model)
    return model, Report(tuple(outcomes.values()))


def keep_outputs(model: nn.Module) -> None:
    """Take `save_memory` back."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if _is_ours(hook):
                    del hooks[number]
                    module._forward_hooks_always_called.pop(number, None)


def _outcome(name: str, layer: nn.Module, compiled: bool) -> LayerReport:
    kind = type(layer)
    forward = nn.modules.batchnorm._BatchNorm.forward
    if compiled:
        return LayerReport(name, "left alone", why=_COMPILED)
    if isinstance(layer, torch.jit.ScriptModule):
        return LayerReport(
            name, "left alone", why="is compiled by torch.jit: do it before the model is scripted"
        )
    if is_patched(layer):
        return LayerReport(name, "left alone", why="its forward was replaced on the instance")
    if is_ours(layer):
        after = layer.activation
        fused = (
            f", {after}"
            if isinstance(after, str)
            else f", {type(after).__name__}"
            if after is not None
            else ""
        )
        return LayerReport(name, "recomputed", f"output{fused}")
    if kind.forward is forward or is_timm_s(layer):
        return LayerReport(name, "recomputed", "moments and output", "bn.upgrade first makes it cheaper")
    if isinstance(layer, nn.SyncBatchNorm):
        return LayerReport(
            name, "left alone", why="is SyncBatchNorm: bn.convert_sync makes it ours, whose is made again"
        )
    return LayerReport(
        name,
        "left alone",
        why=f"{kind.__name__} of {kind.__module__} has a forward of its own: only what it makes by "
        "torch.nn.functional.batch_norm is made again",
    )


def _hook(module: nn.Module, whole: bool) -> None:
    if any(map(_is_ours, module._forward_pre_hooks.values())):
        return
    hooks = _Hooks(whole)
    module.register_forward_pre_hook(hooks.begin)
    module.register_forward_hook(hooks.end, always_call=True)


class _Hooks:
    """Before and after the forward pass of a module, the whole model or a child, also where that raises."""

    def __init__(self, whole: bool) -> None:
        self._whole = whole

    def begin(self, module: nn.Module, inputs: Any) -> None:
        """Begin to record, unless a module around this one does, or somebody else decides what is saved."""
        if torch.compiler.is_compiling():
            if self._whole and not torch.compiler.is_exporting():
                _say_compiled()
            return
        if not torch.is_grad_enabled() or captured() or transformed() or _is_traced(inputs):
            return
        if (
            recipes.active() is not None
        ):  # of a module around this one, or left open by Ctrl-C, which calls no hook
            return
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if hooks is not None and not recipes.watching():
            return
        with ExitStack() as entered:
            recording = entered.enter_context(recipes.Recording(self))
            entered.enter_context(Watch(recording))
            recording.close = entered.pop_all().close

    def end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """End what `begin` began."""
        recording = None if torch.compiler.is_compiling() else recipes.active()
        if recording is not None and recording.owner is self:
            recording.close()


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), _Hooks)


def _is_traced(inputs: Any) -> bool:
    return torch.fx._symbolic_trace.is_fx_symbolic_tracing() or any(
        isinstance(each, torch.fx.Proxy) for each in inputs
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _say_compiled() -> None:
    warnings.warn(
        "bn.save_memory does nothing in a compiled model: torch.compile decides what is kept, and makes cheap tensors "
        "again already",
        RuntimeWarning,
        stacklevel=2,
    )
