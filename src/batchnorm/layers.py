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
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from batchnorm import functional
from batchnorm.kernels.reference import Activation, activation_function
from batchnorm.moments import Moments, positions
from batchnorm.statistics.domain import active
from batchnorm.statistics.running import RunningStatistics, apply_widely, rate, widen
from batchnorm.statistics.source import Batch, Statistics


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
        num_features: C, the number of channels of an input (N, C, *S); or (C, *S): then every activation has moments,
            weight and bias of its own, which are of that shape (alg. 1 itself, before section 3.2).
        eps: added to the variance, inside the root.
        momentum: weight of the new batch in the running statistics; None averages all batches equally.
        affine: learn `weight` (γ) and `bias` (β), (C,) each.
        track_running_stats: keep `running_mean` and `running_var`, float32 or wider whatever `dtype` is.
        device: of parameters and buffers.
        dtype: of the parameters.
        bias: False learns `weight` alone (needs a torch whose layers have this argument).
        activation: None, "relu", "leaky_relu", "relu6", "silu", "sigmoid", "tanh", a module or a function.
        statistics: by whose moments a training batch is normalised: None, its own; Ghost, Sync, Renorm, Population.
        debiased: the exponential average forgets what the buffers began with: of the first batch it is that batch.
        on_single: what one value per channel does in training, whose variance is 0: "raise" a ValueError, or take
            the "running" statistics for this batch, which then does not enter them.
    """

    num_batches_skipped: Tensor | None
    domains: nn.ModuleDict
    num_features: int | tuple[int, ...]  # type: ignore[assignment]
    _shapes: str
    _ranks: tuple[int, ...]

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation = None,
        statistics: Statistics | None = None,
        debiased: bool = False,
        on_single: Literal["raise", "running"] = "raise",
    ) -> None:
        activation_function(activation)  # an unknown name fails here, not in the first forward
        _check_options(statistics, on_single)
        without_bias = {} if bias else {"bias": False}
        super().__init__(
            num_features,  # type: ignore[arg-type]  # its tensors are made for any shape
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            **without_bias,
        )
        widen(self)
        skipped = torch.zeros((), dtype=torch.long, device=device) if track_running_stats else None
        # not in the state_dict, whose keys are torch's
        self.register_buffer("num_batches_skipped", skipped, persistent=False)
        self._warned_of_skipped = False
        self._path = ""
        self.activation = activation
        self.statistics = statistics
        self.debiased, self.on_single = debiased, on_single

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalise `input`, (N, C, *S); add `residual`, of the same shape; apply the activation.

        mask: bool, broadcastable to (N, 1, *S), True where a position is valid; or the lengths of sequences, (N,)
            integers, for an input of (N, C, L). Padding may hold anything, has no say in any statistic or gradient,
            and comes out as 0.

        Raises: ValueError for a wrong rank, for one value per channel in training and for a residual or mask of another
            shape; RuntimeError for a wrong number of channels; NotImplementedError for an input that
            is not floating point; TypeError for a mask that is neither bool nor lengths. A note on the error names
            the layer.
        """
        for value in (input, residual, mask):  # stay one node of an fx graph, as torch's own layers do
            if type(value) is not Tensor and isinstance(cast(object, value), torch.fx.Proxy):
                return self._as_fx_node(value, input, residual, mask)
        try:
            self._check_input_dim(input)
            if mask is not None:
                mask = positions(mask, input)
            if isinstance(self.num_features, int):
                return self._normalised(input, residual, mask, self.weight, self.bias)
            return self._each_activation(input, residual, mask)
        except Exception as error:
            error.add_note(f"in layer {_qualified_name(self)}")
            raise

    def _normalised(
        self,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        mean = var = batches = None
        if self.track_running_stats or not self.training:  # it may be switched off after construction
            mean, var, batches = self._running()
        by_batch = self.training or (mean is None and var is None)
        try:
            if self.statistics is None or not self.training:
                output, moments = functional.normalise(
                    input, mean, var, weight, bias, by_batch, self.eps, self.activation, residual, mask
                )
            else:
                output, moments = self.statistics(
                    Batch(
                        input,
                        weight,
                        bias,
                        self.eps,
                        self.activation,
                        residual,
                        mask,
                        mean,
                        var,
                        batches,
                        self._name,
                    )
                )
        except functional.OneValueError:
            if self.on_single == "raise" or mean is None:
                raise
            output, moments = functional.normalise(
                input, mean, var, weight, bias, False, self.eps, self.activation, residual, mask
            )
        if moments is not None and mean is not None and var is not None:
            self._track(moments, mean, var, batches)  # last: a call that fails moves nothing
        return output

    def _each_activation(self, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        """An activation is a channel of an input without positions."""
        if input.shape[1:] != self.num_features:
            raise RuntimeError(
                f"expected (N, {str(self.num_features)[1:-1]}), got shape {tuple(input.shape)}: "
                "num_features is (C, *S) of the input where every activation has statistics of its own"
            )
        weight, bias = (None if values is None else values.flatten() for values in (self.weight, self.bias))
        output = self._normalised(
            input.flatten(1),
            None if residual is None else residual.flatten(1),
            None if mask is None else mask.expand_as(input).flatten(1),
            weight,
            bias,
        )
        return output.reshape(input.shape)

    def _running(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The running mean and variance, (C,), and how many batches they have seen, of the domain that is active."""
        name = active()
        its = self if name is None or self.running_mean is None else self._domain(name)
        mean, var, batches = its.running_mean, its.running_var, its.num_batches_tracked
        if mean is not None and mean.dim() > 1:
            return mean.flatten(), None if var is None else var.flatten(), batches  # views
        return mean, var, batches

    def running_statistics(self) -> tuple[Tensor, Tensor]:
        """The running mean and variance of the domain that is active, (C,) each; a new domain's begin as a layer's do.

        Raises: RuntimeError for a layer that keeps none.
        """
        name = active()
        if name is not None and self.running_mean is not None and name not in self._domains():
            self._add_domain(name)
        mean, var, _ = self._running()
        if mean is None or var is None:
            raise RuntimeError(
                "this layer keeps no running statistics: make it with track_running_stats=True"
            )
        return mean, var

    def _domain(self, name: str) -> RunningStatistics:
        """The named set of running statistics, made when a training batch first comes to it."""
        if name not in self._domains():
            if not self.training:
                names = ", ".join(self._domains()) or "none"
                raise RuntimeError(
                    f"no running statistics of domain {name!r} (there are: {names}): "
                    f"train on it, or adapt to it, within bn.domain({name!r}) first"
                )
            self._add_domain(name)
        return self._domains()[name]

    def _domains(self) -> dict[str, RunningStatistics]:
        return cast(dict[str, RunningStatistics], getattr(self._modules.get("domains"), "_modules", {}))

    def _add_domain(self, name: str) -> None:
        assert self.running_mean is not None
        if "domains" not in self._modules:
            self.domains = nn.ModuleDict().train(self.training)
        self.domains[name] = RunningStatistics(self.running_mean).train(self.training)

    def _name(self) -> str:
        """The layer's path in its model and its repr; looked for once, unless the layer stands alone."""
        if torch.compiler.is_compiling():
            return type(self).__name__
        if not self._path:
            name = _qualified_name(self)
            if not name.startswith("'"):
                return name
            self._path = name
        return self._path

    def _track(self, moments: Moments, mean: Tensor, var: Tensor, batches: Tensor | None) -> None:
        """Let the batch enter the running statistics, if it may, and count it."""
        if (isinstance(moments.count, int) and moments.count == 0) or _recomputing():
            return
        following = rate(self.momentum, batches, self.debiased)
        entered = functional.track(moments, mean, var, following, batches)
        if entered is True:  # known at once, on a CPU
            return
        skipped = ~torch.as_tensor(entered)
        if isinstance(moments.count, Tensor):
            skipped = skipped & (moments.count > 0).any()  # of padding alone it says nothing
        if self.num_batches_skipped is not None:
            self.num_batches_skipped.add_(skipped)
            if skipped.device.type == "cpu":
                self._warn_of_skipped(skipped)

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
        """As torch's, in every domain; also forget the batches that were skipped."""
        super().reset_running_stats()
        for its in self._domains().values():
            its.reset()
        self._forget_skipped()

    def _forget_skipped(self) -> None:
        skipped = self._buffers.get("num_batches_skipped")  # torch's constructor resets before it exists
        if skipped is not None and self.running_mean is not None:
            if skipped.device != self.running_mean.device:  # the statistics were assigned to a layer on meta
                self.num_batches_skipped = torch.empty_like(skipped, device=self.running_mean.device)
            self._buffers["num_batches_skipped"].zero_()  # type: ignore[union-attr]
            self._warned_of_skipped = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        skipped = self.num_batches_skipped
        apply_widely(self, lambda: super(_BatchNorm, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        if skipped is not None and skipped.is_meta:
            self._forget_skipped()  # what was materialised is arbitrary, and no checkpoint brings a value
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        state_dict, prefix = args[:2]
        if self.running_mean is not None:
            for name in sorted(_domains_in(state_dict, prefix).difference(self._domains())):
                self._add_domain(name)
        super()._load_from_state_dict(*args)
        widen(self)  # load_state_dict(assign=True) takes the checkpoint's tensors as they are
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

    def _as_fx_node(self, proxy: Any, input: Any, residual: Any, mask: Any) -> Tensor:
        arguments = (input,) if residual is None and mask is None else (input, residual)
        arguments = arguments if mask is None else (*arguments, mask)
        path = proxy.tracer.path_of_module(self)
        return cast(Tensor, proxy.tracer.create_proxy("call_module", path, arguments, {}))

    def extra_repr(self) -> str:
        """Torch's, and what else is set; an activation that is a module prints itself."""
        own = None if isinstance(self.activation, nn.Module) else self.activation
        named = {
            "activation": own,
            "statistics": self.statistics,
            "debiased": self.debiased or None,
            "on_single": None if self.on_single == "raise" else self.on_single,
        }
        more = "".join(f", {name}={value!r}" for name, value in named.items() if value is not None)
        return f"{super().extra_repr()}{more}"  # type: ignore[no-untyped-call]


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


class BatchNorm(_BatchNorm):
    __doc__ = f"Batch normalization of (N, C, *S) inputs of any rank.\n\n    {_BatchNorm.__doc__}"
    _shapes = "(N, C, *S)"

    def _check_input_dim(self, input: Tensor) -> None:
        """Any rank will do; functional.normalise refuses less than 2."""


def _check_options(statistics: Statistics | None, on_single: str) -> None:
    if statistics is not None and not isinstance(statistics, Statistics):
        raise TypeError(
            f"statistics is one of bn.Ghost(size), bn.Sync(), bn.Renorm(), bn.Population(), or None, got {statistics!r}"
        )
    if on_single not in ("raise", "running"):
        raise ValueError(f'on_single is "raise" or "running", got {on_single!r}')


def _domains_in(state_dict: dict[str, Any], prefix: str) -> set[str]:
    """The names of the domains that a layer has in `state_dict`."""
    prefix += "domains."
    return {key.removeprefix(prefix).partition(".")[0] for key in state_dict if key.startswith(prefix)}


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
