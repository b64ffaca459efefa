"""Batch normalization as functions: `batch_norm` with torch's signature, and the two steps it is made of.

normalise, add the residual and activate  →  track the batch's moments in the running statistics
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from batchnorm.kernels import dispatch
from batchnorm.kernels.call import Activation, Call
from batchnorm.kernels.dispatch import moments as moments
from batchnorm.kernels.dispatch import total as total
from batchnorm.kernels.dispatch import track as track
from batchnorm.kernels.observers import transformed
from batchnorm.moments import Moments, accumulator, count_per_channel, positions


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Batch normalization of each channel of `input` (Ioffe & Szegedy 2015, algorithms 1 and 2, section 3.2).

        output = activation(weight · (input - mean) / √(var + eps) + bias + residual)

    training: use the batch's mean and biased variance, and move the running statistics, if given, in place:

        running_mean ← (1 - momentum)·running_mean + momentum·mean
        running_var  ← (1 - momentum)·running_var  + momentum·var·count/(count - 1)

        A batch whose moments are not all finite leaves them as they were, and so does an empty one.
    not training: use the running statistics, constants to the gradient.

    Args:
        input: (N, C, *S), any floating dtype; statistics are computed in float32 or wider.
        running_mean: (C,) or None; required unless training.
        running_var: (C,) or None, as running_mean; an average of unbiased variances.
        weight: (C,) the paper's γ; None stands for 1.
        bias: (C,) the paper's β; None stands for 0.
        training: as above.
        momentum: the weight of the new batch, torch's convention (Keras's and TensorFlow's is 1 - momentum).
        eps: added to the variance, inside the root; in the unit of the input squared.
        activation: None, "relu", "leaky_relu", "relu6", "silu", "sigmoid", "tanh", or a function of a tensor.
        residual: added before the activation; has the shape of `input`.
        mask: bool, broadcastable to (N, 1, *S), True where a position is valid; or the lengths of sequences, (N,)
            integers, for an input of (N, C, L). The rest is padding: it may hold anything, enters neither the
            moments nor their gradient nor that of weight and bias, and the output is 0 there, as is the gradient of
            input and residual.

    Returns: the output, in the shape and dtype of `input`.

    Raises:
        ValueError: one value per channel when training; eps ≤ 0 when training; only one running statistic
            given; an unknown activation; a residual or a mask of another shape.
        TypeError: a mask that is neither bool nor lengths.
        RuntimeError: a per-channel argument whose shape is not (C,); no running statistics when not training, or one
            that requires a gradient; an update of running statistics within torch.func's transforms; an input of less
            than 2 dimensions, unless that is an IndexError.
        IndexError: as torch's, an input of less than 2 dimensions when training without running statistics.
        NotImplementedError: an input that is not floating point.

    Example:
        >>> import torch, batchnorm as bn
        >>> x = torch.randn(16, 8, 7, 7)
        >>> y = bn.batch_norm(x, None, None, training=True, activation="relu", residual=x)
        >>> y.shape
        torch.Size([16, 8, 7, 7])
        >>> torch.allclose(y, torch.nn.functional.batch_norm(x, None, None, training=True).add(x).relu(), atol=1e-5)
        True
    """
    tensors = input, running_mean, running_var, weight, bias, residual, mask
    if has_torch_function(tensors):
        return handle_torch_function(
            batch_norm,
            tensors,
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            activation=activation,
            residual=residual,
            mask=mask,
        )
    if mask is not None:
        mask = positions(mask, input)
    tracked = training and running_mean is not None and running_var is not None
    rate = momentum if tracked else None
    call = Call(training, eps, activation, running_mean, running_var, rate, mask=mask)
    return normalise(input, weight, bias, residual, call)


def normalise(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> Tensor:
    """As `batch_norm`, by a `call` that says the rest; what it found is in the call.

    The running statistics are updated last, if `call.rate` is not None: a call that fails moves nothing.
    """
    _check(input, weight, bias, residual, call)
    output = dispatch.normalise(input, weight, bias, residual, call)
    if call.mask is not None or call.exchange is not None:
        _check_counts(input, call)
    if call.updated is None and call.rate is not None:
        moments = call.batch_moments()
        if moments is not None:
            call.updated = update(moments, call.running_mean, call.running_var, call.rate, call.batches)
    return output


def update(
    moments: Moments,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    rate: float | Tensor,
    batches: Tensor | None = None,
) -> bool | Tensor | None:
    """As `track`; None, and nothing done, where there is no value or nothing to update."""
    if (
        running_mean is None
        or running_var is None
        or (not isinstance(moments.count, Tensor) and moments.count == 0)
        or not moments.mean.numel()  # no channels, of which all would be finite
    ):
        return None
    try:
        return track(moments, running_mean, running_var, rate, batches)
    except RuntimeError as error:
        if not transformed():
            raise
        raise RuntimeError(
            "running statistics cannot be updated here: they are not among what torch.func transforms. Make the layer "
            "with track_running_stats=False, call .eval(), or hand buffers over with the parameters: "
            "torch.func.functional_call(model, (parameters, buffers), input), under vmap those of stack_module_state"
        ) from error


class OneValueError(ValueError):
    """A channel of a training batch has one value, whose deviation from its mean is 0 whatever it is."""


def _check_counts(input: Tensor, call: Call) -> None:
    """Refuse one value per channel, where the number is known without waiting for a device."""
    moments = call.batch_moments()
    if moments is None or not input.size(1):
        return
    counts = moments.count
    if isinstance(counts, Tensor):
        if not counts.is_cpu or torch.compiler.is_compiling() or transformed():
            return
        if not bool((counts == 1).any()):
            return
    elif counts != 1:
        return
    raise _one_value(input)


def _one_value(input: Tensor) -> OneValueError:
    return OneValueError(
        f"Expected more than 1 value per channel when training, got input size {input.size()}: "
        "use a larger batch (a DataLoader with drop_last=True), .eval() to use running statistics, or a layer "
        'with on_single="running", which uses them for such a batch alone'
    )


def _check(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> None:
    """Raise torch's errors for what cannot be normalised, and say what to do about it."""
    training, running_mean, running_var = call.training, call.running_mean, call.running_var
    shape = input.shape
    if len(shape) < 2:
        # torch asks its per-channel arguments first
        raise (IndexError if training and running_mean is None else RuntimeError)(
            f"expected (N, C, ...) with at least 2 dimensions, got shape {tuple(shape)}: "
            "add the batch dimension with input.unsqueeze(0)"
        )
    accumulator(input.dtype)  # raises for what is not floating point
    if not training and (running_mean is None or running_var is None):
        raise RuntimeError(
            "running_mean and running_var must be defined in evaluation mode: "
            "pass them, or training=True to use the batch's own statistics"
        )
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    per_channel = shape[1:2]
    for values in (running_mean, running_var, weight, bias):
        if values is not None:
            if values.shape != per_channel:
                raise _of_another_size(input, running_mean, running_var, weight, bias)
            if values.dtype is not torch.float32:
                accumulator(values.dtype)
    # only one sample can be one value; of a mask `_check_counts` counts
    if training and call.exchange is None and call.mask is None and (shape[0] == 1 or call.group == 1):
        group = call.group
        if count_per_channel(input[:group] if group else input) == 1:
            raise _one_value(input)
    if torch.is_grad_enabled():
        for name, values in (("running_mean", running_mean), ("running_var", running_var)):
            if values is not None and values.requires_grad:
                raise RuntimeError(
                    f"batch_norm is not differentiable with respect to argument '{name}', a constant, which cannot "
                    f"have requires_grad True: pass {name}.detach()"
                )
    eps = call.eps
    if eps <= 0 if training else eps < 0:
        raise ValueError(
            f"batch_norm eps must be {'positive' if training else 'non-negative'}, but got {eps}"
        )
    if residual is not None:
        check_residual(residual, input)


def check_residual(residual: Tensor, input: Tensor) -> None:
    """Raise ValueError unless `residual` has the shape of `input`."""
    if residual.shape != input.shape:
        raise ValueError(
            f"the residual has shape {tuple(residual.shape)} but is added to {tuple(input.shape)}: "
            "project or pad it first, it is not broadcast"
        )


def _of_another_size(input: Tensor, *per_channel: Tensor | None) -> RuntimeError:
    names = ("running_mean", "running_var", "weight", "bias")
    name, values = next(
        (name, values)
        for name, values in zip(names, per_channel, strict=True)
        if values is not None and values.shape != input.shape[1:2]
    )
    given = values.numel() if values.dim() == 1 else f"a shape of {tuple(values.shape)}"
    return RuntimeError(
        f"{name} should contain {input.size(1)} elements not {given}: the input of shape "
        f"{tuple(input.shape)} has {input.size(1)} channels in dimension 1; set num_features to that, "
        "or move the channels to dimension 1"
    )
