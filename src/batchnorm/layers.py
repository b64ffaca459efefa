"""`BatchNorm1d`, `BatchNorm2d`, `BatchNorm3d`: drop-in subclasses of torch's layers.

The same constructor, the same errors and the same state_dict keys (an activation module with parameters adds
its own), so a checkpoint moves both ways and `isinstance(layer, torch.nn.BatchNorm2d)` holds.
What they do better is in docs/numerics.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from batchnorm import functional, guards
from batchnorm.kernels.call import Activation, Call
from batchnorm.kernels.observers import recomputing
from batchnorm.kernels.reference import activation_function
from batchnorm.layer_path import name_of, qualified_name
from batchnorm.moments import positions
from batchnorm.running.buffers import RunningStatistics, flat
from batchnorm.running.tracking import Tracking
from batchnorm.statistics.batch import Batch, Statistics
from batchnorm.statistics.population import Population
from batchnorm.statistics.sync import Sync


# What the three layers share; they differ in the ranks they accept, which torch's classes check.
class _BatchNorm(Tracking):
    """Batch normalization of {shapes} inputs: by the batch when training, by running statistics in evaluation.

    In training the output is activation(weight·x̂ + bias + residual), x̂ normalised by the batch's moments, and
    the running statistics follow the batch (Ioffe & Szegedy 2015, algorithms 1 and 2). In evaluation x̂ is normalised by
    the running statistics, or still by the batch's when `track_running_stats=False`.

    A batch whose mean or variance is inf or nan does not enter the running statistics:
    `num_batches_skipped` counts such batches and the first one warns. A forward pass that recomputes
    activations during the backward pass (torch.utils.checkpoint) does not enter them a second time.

    Tools that would drop `activation`, `statistics` or another option (torch's converters and fusers) raise a
    RuntimeError that names the call to use; `downgrade` makes a layer torch's.

    Args:
        num_features: C, the number of channels of an input (N, C, *S); or (C, *S): then every activation has moments,
            weight and bias of its own, which are of that shape (algorithm 1 itself, before section 3.2).
        eps: added to the variance, inside the root; in the unit of the input squared.
        momentum: weight of the new batch in the running statistics, torch's convention; None averages all batches
            equally (algorithm 2).
        affine: learn `weight` (γ) and `bias` (β), (C,) each.
        track_running_stats: keep `running_mean` and `running_var`, float32 or wider whatever `dtype` is.
        device: of parameters and buffers.
        dtype: of the parameters.
        bias: False learns `weight` alone (needs a torch whose layers have this argument).
        activation: None, "relu", "leaky_relu", "relu6", "silu", "sigmoid", "tanh", a module or a function.
        statistics: by whose moments a training batch is normalised: None, its own; Ghost, Sync, Renorm, Population.
        debiased: the exponential average forgets what the buffers began with: of the first batch it is that batch
            (Kingma & Ba 2014, section 3).
        on_single: what one value per channel does in training, whose variance is 0: "raise" a ValueError, or take
            the "running" statistics for this batch, which then does not enter them.

    Raises:
        ValueError: an unknown activation or `on_single`.
        TypeError: `statistics` is not one of those named above.

    Example:
        >>> import torch, batchnorm as bn
        >>> {layer}
        >>> {output}
        >>> output.shape
        {size}
    """

    num_features: int | tuple[int, ...]  # type: ignore[assignment]
    statistics: Statistics | None = None
    restorable: Activation = None  # what a rewritten forward does itself again where this layer is replaced
    _shapes: str
    _ranks: tuple[int, ...]

    def __init__(
        self,
        num_features: int | Sequence[int],
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
        check_options(statistics, on_single)
        if isinstance(num_features, Sequence):
            num_features = tuple(num_features)  # a list would be no shape
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
        self._begin_tracking()
        self.activation = activation
        self.statistics = statistics
        self.debiased, self.on_single = debiased, on_single

    # What other people's tools ask of a layer; guards.py says what for.
    @property
    def eps(self) -> float:
        """Of the constructor."""
        if not torch.compiler.is_compiling():
            guards.check_reader(sys._getframe(1), self._beside_torch_s)
        return cast(float, self.__dict__["eps"])

    @eps.setter
    def eps(self, value: float) -> None:
        self.__dict__["eps"] = value

    @property
    def __class__(self) -> type:
        """Its type; to DistributedDataParallel a layer with Sync is a SyncBatchNorm, which it is in what it does."""
        synchronized = isinstance(self.__dict__.get("statistics"), Sync)
        return nn.SyncBatchNorm if synchronized and guards.read_by_ddp(sys._getframe(1)) else type(self)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        vars(object)["__class__"].__set__(self, kind)

    def named_modules(self, *arguments: Any, **named: Any) -> Iterator[tuple[str, nn.Module]]:
        """As torch's; also what everybody calls who looks for layers of a class."""
        guards.check_walker(sys._getframe(1))
        guards.register_in_opacus((BatchNorm, *OURS.values()), lambda layer: layer._beside_torch_s(False))
        return cast(Iterator[tuple[str, nn.Module]], super().named_modules(*arguments, **named))

    def _beside_torch_s(self, trained: bool) -> list[str]:
        """What it does that torch's layer of its rank does not, in evaluation, or also when it is `trained`."""
        found = []
        if self.activation is not None and self.activation != self.restorable:
            found.append(f"activation={self.activation!r}")
        if trained:
            if not isinstance(self.statistics, Sync | None):
                found.append(f"statistics={self.statistics!r}")
            found += ["debiased=True"] * self.debiased
            found += [f"on_single={self.on_single!r}"] * (self.on_single != "raise")
            found += [f"domain {name!r}" for name in self.domain_names()]
        return found

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalise `input`, add `residual`, apply the activation.

        Args:
            input: (N, C, *S), float16, bfloat16, float32 or float64; statistics are computed in float32 or wider.
            residual: added before the activation; has the shape of `input`.
            mask: bool, broadcastable to (N, 1, *S), True where a position is valid; or the lengths of sequences, (N,)
                integers, for an input of (N, C, L). Padding may hold anything, enters no statistic and no gradient,
                and comes out as 0.

        Returns: the output, in the shape and dtype of `input`.

        Raises:
            ValueError: a wrong rank; one value per channel in training; a residual or mask of another shape.
            RuntimeError: a wrong number of channels.
            NotImplementedError: `input` is not floating point.
            TypeError: `mask` is neither bool nor lengths.

        A note on each error names the layer.

        Example:
            >>> import torch, batchnorm as bn
            >>> layer = bn.BatchNorm1d(8)
            >>> padded = layer(torch.randn(2, 8, 50), mask=torch.tensor([50, 7]))
            >>> padded[1, :, 7:].abs().max().item()
            0.0
        """
        if type(input) is not Tensor or residual is not None or mask is not None:
            for value in (input, residual, mask):  # stay one node of an fx graph, as torch's own layers do
                if isinstance(cast(object, value), torch.fx.Proxy):
                    return self._as_fx_node(value, input, residual, mask)
        try:
            if input.dim() not in self._ranks:
                self._check_input_dim(input)
            if mask is not None:
                mask = positions(mask, input)
            if not isinstance(self.num_features, tuple):
                return self._normalised(input, residual, mask, *self._affine())
            return self._each_activation(input, residual, mask)
        except Exception as error:
            error.add_note(f"in layer {qualified_name(self)}")
            raise

    def _normalised(
        self,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        holder = mean = var = batches = rate = None
        if self.track_running_stats or not self.training:  # it may be switched off after construction
            holder = self.active_statistics()
            mean, var = flat(holder)
            batches = holder._buffers["num_batches_tracked"]
        by_batch = self.training or (mean is None and var is None)
        if by_batch and self.follows and holder is not None and mean is not None and not recomputing():
            rate = self.rate_of_next(holder)
        call = Call(by_batch, self.__dict__["eps"], self.activation, mean, var, rate, batches, mask)
        call.skipped = self.num_batches_skipped
        try:
            if self.statistics is None or not self.training:
                output = functional.normalise(input, weight, bias, residual, call)
            else:
                output = self._by_statistics(self.statistics, input, weight, bias, residual, call)
        except functional.OneValueError:
            if self.on_single == "raise" or mean is None or holder is None or not self.owns(holder):
                raise
            self._warn_of_single(holder)
            call = Call(False, self.__dict__["eps"], self.activation, mean, var, mask=mask)
            output = functional.normalise(input, weight, bias, residual, call)
        if call.rate is not None:
            if call.updated is not True:  # known at once, on a CPU
                self._count_skipped(call)
            if isinstance(holder, RunningStatistics) and call.batch_moments() is not None:
                self.add_domain(holder)
        return output

    def _by_statistics(
        self,
        statistics: Statistics,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
    ) -> Tensor:
        """As functional.normalise, by the moments that `statistics` choose."""
        batch = Batch(
            input,
            weight,
            bias,
            call.eps,
            self.activation,
            residual,
            call.mask,
            call.running_mean,
            call.running_var,
            call.batches,
            lambda: name_of(self),
        )
        output, call.moments = statistics(batch)
        if call.moments is not None and call.rate is not None:
            call.updated = functional.update(
                call.moments, call.running_mean, call.running_var, call.rate, call.batches
            )
        return output

    def _follows_batches(self) -> bool:
        return self.training and not self._frozen()

    def _frozen(self) -> bool:
        return isinstance(self.statistics, Population)

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias; as attributes, each costs a microsecond."""
        parameters = self._parameters
        if "weight" in parameters and "bias" in parameters:
            return parameters["weight"], parameters["bias"]
        return self.weight, self.bias  # parametrized, pruned, ...

    def _each_activation(self, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        """An activation is a channel of an input without positions."""
        if input.shape[1:] != self.num_features:
            raise RuntimeError(
                f"expected (N, {str(self.num_features)[1:-1]}), got shape {tuple(input.shape)}: "
                "num_features is (C, *S) of the input where every activation has statistics of its own"
            )
        if residual is not None:
            functional.check_residual(residual, input)
        weight, bias = (None if values is None else values.flatten() for values in self._affine())
        output = self._normalised(
            input.flatten(1),
            None if residual is None else residual.flatten(1),
            None if mask is None else mask.expand_as(input).flatten(1),
            weight,
            bias,
        )
        return output.reshape(input.shape)

    def _check_input_dim(self, input: Tensor) -> None:
        try:
            super()._check_input_dim(input)  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise ValueError(
                f"{error}: {type(self).__name__} takes {self._shapes}; for an input of shape "
                f"{tuple(input.shape)} {_advice(input.dim())}"
            ) from None

    def _as_fx_node(self, proxy: Any, input: Any, residual: Any, mask: Any) -> Tensor:
        guards.check_tracer(proxy.tracer)
        arguments = (input,) if residual is None and mask is None else (input, residual)
        arguments = arguments if mask is None else (*arguments, mask)
        path = proxy.tracer.path_of_module(self)
        if type(self).forward is _BatchNorm.forward:
            return cast(Tensor, proxy.tracer.create_proxy("call_module", path, arguments, {}))
        # a call from a subclass's forward, which is being traced: the module's would be that forward again
        layer = proxy.tracer.create_proxy("get_attr", path, (), {})
        return cast(Tensor, proxy.tracer.create_proxy("call_function", inherited, (layer, *arguments), {}))

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
    __doc__ = (_BatchNorm.__doc__ or "").format(
        shapes="(N, C) or (N, C, L)",
        layer='layer = bn.BatchNorm1d(8, activation="relu", debiased=True)',
        output="output = layer(torch.randn(16, 8))",
        size="torch.Size([16, 8])",
    )
    _shapes = "(N, C) or (N, C, L)"
    _ranks = (2, 3)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    __doc__ = (_BatchNorm.__doc__ or "").format(
        shapes="(N, C, H, W)",
        layer='x, layer = torch.randn(16, 8, 7, 7), bn.BatchNorm2d(8, activation="relu")',
        output="output = layer(x, residual=x)",
        size="torch.Size([16, 8, 7, 7])",
    )
    _shapes = "(N, C, H, W)"
    _ranks = (4,)


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    __doc__ = (_BatchNorm.__doc__ or "").format(
        shapes="(N, C, D, H, W)",
        layer="layer = bn.BatchNorm3d(8, momentum=None).eval()",
        output="output = layer(torch.randn(1, 8, 4, 7, 7))",
        size="torch.Size([1, 8, 4, 7, 7])",
    )
    _shapes = "(N, C, D, H, W)"
    _ranks = (5,)


class BatchNorm(_BatchNorm):
    __doc__ = (_BatchNorm.__doc__ or "").format(
        shapes="(N, C, *S)",
        layer="layer = bn.BatchNorm((8, 5, 5))  # every activation by itself",
        output="output = layer(torch.randn(16, 8, 5, 5))",
        size="torch.Size([16, 8, 5, 5])",
    )
    _shapes = "(N, C, *S)"
    _ranks = ()

    def _check_input_dim(self, input: Tensor) -> None:
        """Any rank will do; functional.normalise refuses less than 2."""


# by torch's class
OURS: dict[type[nn.Module], type[_BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
guards.register(OURS)


def inherited(layer: _BatchNorm, *arguments: Any) -> Tensor:
    """The forward that the class of `layer` inherits from ours; a graph calls it."""
    return _BatchNorm.forward(layer, *arguments)


def check_options(statistics: Statistics | None, on_single: str) -> None:
    """Raise for options that no layer takes."""
    if statistics is not None and not isinstance(statistics, Statistics):
        raise TypeError(
            f"statistics is one of bn.Ghost(size), bn.Sync(), bn.Renorm(), bn.Population(), or None, got {statistics!r}"
        )
    if on_single not in ("raise", "running"):
        raise ValueError(f'on_single is "raise" or "running", got {on_single!r}')


def _advice(dims: int) -> str:
    if 3 <= dims <= 5:
        return f"use BatchNorm{dims - 2}d, or add the missing dimension with unsqueeze"
    return "use BatchNorm1d" if dims == 2 else "reshape it: the batch comes first, the channels second"
