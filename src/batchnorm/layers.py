"""`BatchNorm1d`, `BatchNorm2d`, `BatchNorm3d`: drop-in subclasses of torch's layers.

The same constructor, the same errors and the same state_dict keys (an activation module with parameters adds
its own), so a checkpoint moves both ways and `isinstance(layer, torch.nn.BatchNorm2d)` holds.
What they do better is in docs/numerics.md.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from batchnorm import functional
from batchnorm.kernels.reference import Activation, activation_function
from batchnorm.moments import Moments


# What the three layers share; they differ in the ranks they accept, which torch's classes check.
class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization by the batch when training, by running statistics in evaluation.

    In training the output is activation(weight·x̂ + bias + residual), x̂ normalised by the batch's moments, and
    the running statistics follow the batch (Ioffe & Szegedy 2015, alg. 1 and 2). In evaluation x̂ is normalised by
    the running statistics, or still by the batch's when `track_running_stats=False`.

    A batch whose mean or variance is inf or nan does not enter the running statistics:
    `num_batches_skipped` counts such batches and the first one warns. A forward pass that recomputes
    activations during the backward pass (torch.utils.checkpoint) does not enter them a second time.

    torch's converters (SyncBatchNorm, fusion) know nothing of `activation`, which they drop, and of `residual`.

    Args:
        num_features: C, the number of channels of an input (N, C, *S).
        eps: added to the variance, inside the root.
        momentum: weight of the new batch in the running statistics; None averages all batches equally.
        affine: learn `weight` (γ) and `bias` (β), (C,) each.
        track_running_stats: keep `running_mean` and `running_var`, float32 or wider whatever `dtype` is.
        device: of parameters and buffers.
        dtype: of the parameters.
        bias: False learns `weight` alone (needs a torch whose layers have this argument).
        activation: None, "relu", "leaky_relu", "relu6", "silu", "sigmoid", "tanh", a module or a function.
    """

    num_batches_skipped: Tensor | None
    _shapes: str
    _ranks: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation = None,
    ) -> None:
        activation_function(activation)  # an unknown name fails here, not in the first forward
        without_bias = {} if bias else {"bias": False}
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **without_bias
        )
        self._widen_statistics()
        skipped = torch.zeros((), dtype=torch.long, device=device) if track_running_stats else None
        # not in the state_dict, whose keys are torch's
        self.register_buffer("num_batches_skipped", skipped, persistent=False)
        self._warned_of_skipped = False
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise `input`, (N, C, *S); add `residual`, of the same shape; apply the activation.

        Raises: ValueError for a wrong rank, for one value per channel in training and for a residual of another
            shape; RuntimeError for a wrong number of channels; NotImplementedError for an input that
            is not floating point. A note on the error names the layer.
        """
        for value in (input, residual):  # stay one node of an fx graph, as torch's own layers do
            if type(value) is not Tensor and isinstance(cast(object, value), torch.fx.Proxy):
                return self._as_fx_node(value, input, residual)
        mean, var = self.running_mean, self.running_var
        by_batch = self.training or (mean is None and var is None)
        if self.training and not self.track_running_stats:  # it may be switched off after construction
            mean = var = None
        try:
            self._check_input_dim(input)
            output, moments = functional.normalise(
                input, mean, var, self.weight, self.bias, by_batch, self.eps, self.activation, residual
            )
            if moments is not None and mean is not None and var is not None:
                self._track(moments, mean, var)  # last: a call that fails moves nothing
            return output
        except Exception as error:
            error.add_note(f"in layer {_qualified_name(self)}")
            raise

    def _track(self, moments: Moments, mean: Tensor, var: Tensor) -> None:
        """Let the batch enter the running statistics, if it may, and count it."""
        if moments.count == 0 or _recomputing():
            return
        rate: float | Tensor
        if self.momentum is not None:
            rate = self.momentum
        elif self.num_batches_tracked is not None:
            rate = 1 / (self.num_batches_tracked + 1).to(mean.dtype)
        else:
            rate = 0.0  # as torch: without a count there is no average
        entered = functional.track(moments, mean, var, rate, self.num_batches_tracked)
        if entered is True:  # known at once, on a CPU
            return
        entered = torch.as_tensor(entered)
        if self.num_batches_skipped is not None:
            self.num_batches_skipped.add_(~entered)
            if entered.device.type == "cpu":
                self._warn_of_skipped(~entered)

    def train(self, mode: bool = True) -> Self:
        """As torch's; where asking in every step would stall the device, this is where skipped batches warn."""
        if self.num_batches_skipped is not None:
            self._warn_of_skipped(self.num_batches_skipped)
        return super().train(mode)

    def _warn_of_skipped(self, skipped: Tensor) -> None:
        """Warn, once, if `skipped` is not 0, and if its value can be asked for: not compiled, traced or mapped."""
        # compiling first: compiled code that had read the flag would be compiled again once it is set
        if torch.compiler.is_compiling() or self._warned_of_skipped or skipped.is_meta:
            return
        try:
            self._warned_of_skipped = bool(skipped)
        except RuntimeError:
            return
        if self._warned_of_skipped:
            warnings.warn(
                f"layer {_qualified_name(self)} saw a batch whose mean or variance is inf or nan: its running "
                "statistics keep their last good value. num_batches_skipped counts such batches; "
                "this warning is given once",
                RuntimeWarning,
                stacklevel=2,
            )

    def reset_running_stats(self) -> None:
        """As torch's; also forget the batches that were skipped."""
        super().reset_running_stats()
        self._forget_skipped()

    def _forget_skipped(self) -> None:
        skipped = self._buffers.get("num_batches_skipped")  # torch's constructor resets before it exists
        if skipped is not None and self.running_mean is not None:
            if skipped.device != self.running_mean.device:  # the statistics were assigned to a layer on meta
                self.num_batches_skipped = torch.empty_like(skipped, device=self.running_mean.device)
            self._buffers["num_batches_skipped"].zero_()  # type: ignore[union-attr]
            self._warned_of_skipped = False

    def _widen_statistics(self) -> None:
        for name in _STATISTICS:
            values = self._buffers[name]
            if values is not None:
                self._buffers[name] = values.to(_wide(values.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .half() and .bfloat16() arrive here: running statistics follow to the device, not to the dtype,
        # in which they would stop moving (in bfloat16 a mean of 100 is never reached from below 96)
        before = {name: self._buffers[name] for name in _STATISTICS}
        skipped = self.num_batches_skipped
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if skipped is not None and skipped.is_meta:
            self._forget_skipped()  # what was materialised is arbitrary, and no checkpoint brings a value
        for name, values in before.items():
            after = self._buffers[name]
            if values is not None and after is not None and after.dtype != _wide(after.dtype):
                self._buffers[name] = values.to(after.device, _wide(after.dtype))
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._widen_statistics()  # load_state_dict(assign=True) takes the checkpoint's tensors as they are
        state_dict, prefix = args[:2]
        if f"{prefix}running_mean" in state_dict:
            self._forget_skipped()

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() in self._ranks:
            return
        try:
            super()._check_input_dim(input)  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise ValueError(
                f"{error}: {type(self).__name__} takes {self._shapes}; for an input of shape "
                f"{tuple(input.shape)} {_advice(input.dim())}"
            ) from None

    def _as_fx_node(self, proxy: Any, input: Any, residual: Any) -> Tensor:
        arguments = (input,) if residual is None else (input, residual)
        path = proxy.tracer.path_of_module(self)
        return cast(Tensor, proxy.tracer.create_proxy("call_module", path, arguments, {}))

    def extra_repr(self) -> str:
        """Torch's, and the activation unless it is a module, which prints itself."""
        own = self.activation
        named = "" if own is None or isinstance(own, nn.Module) else f", activation={own!r}"
        return f"{super().extra_repr()}{named}"  # type: ignore[no-untyped-call]


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    __doc__ = f"Batch normalization of (N, C) or (N, C, L) inputs.\n\n    {_BatchNorm.__doc__}"
    _shapes = "(N, C) or (N, C, L)"
    _ranks = (2, 3)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    __doc__ = f"Batch normalization of (N, C, H, W) inputs.\n\n    {_BatchNorm.__doc__}"
    _shapes = "(N, C, H, W)"
    _ranks = (4,)


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    __doc__ = f"Batch normalization of (N, C, D, H, W) inputs.\n\n    {_BatchNorm.__doc__}"
    _shapes = "(N, C, D, H, W)"
    _ranks = (5,)


_STATISTICS = ("running_mean", "running_var")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the statistics of a layer converted to `dtype`, even one it can only be stored in (float8)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _advice(dims: int) -> str:
    if 3 <= dims <= 5:
        return f"use BatchNorm{dims - 2}d, or add the missing dimension with unsqueeze"
    return "use BatchNorm1d" if dims == 2 else "reshape it: the batch comes first, the channels second"


def _recomputing() -> bool:
    """Whether this forward pass runs inside a backward pass, as activation checkpointing does it.

    Then its batch has been seen already. Both modes of torch.utils.checkpoint recompute from within the autograd
    engine, where a graph task is current. A compiled model recomputes below the level of modules; only an eager
    checkpoint around a compiled layer is not noticed, since compiled code cannot ask.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _qualified_name(layer: nn.Module) -> str:
    """The path of `layer` in the outermost module that is running now, and its repr; for messages only.

    A layer does not know its name, but the modules that called it stand on the call stack.
    """
    path = ""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module) and caller is not layer:
            path = next((name for name, module in caller.named_modules() if module is layer), path)
        frame = frame.f_back
    return f"{path!r}: {layer}" if path else str(layer)
