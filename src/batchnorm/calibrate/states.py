"""Running statistics of several models, state_dicts or ranks, as one: by the law of total variance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm.graph.modules import has_statistics
from batchnorm.moments import Moments

State = dict[str, Tensor]
_MEAN, _VARIANCE, _BATCHES = "running_mean", "running_var", "num_batches_tracked"


def merge_states(
    states: Sequence[tuple[Mapping[str, Tensor], float]],
    parameters: Literal["equal", "first", "mean"] = "equal",
) -> State:
    """One state_dict of several: of ranks that trained apart, of federated clients, of a soup of models.

        mean = Σ nᵢ·meanᵢ / n      variance = (Σ (nᵢ - 1)·varianceᵢ + Σ nᵢ·(meanᵢ - mean)²) / (n - 1),   n = Σ nᵢ

    The second sum is the variance between the models, which the average of their variances leaves out. With nᵢ the
    numbers of values of a channel that the statistics were taken from, the result is that of all values together. With
    weights that are no such numbers (a float among them) the -1 are left out: shares of a mixture.

    Args:
        states: pairs of a state_dict and its count: how many values of a channel (samples times positions), or its
            weight.
        parameters: what becomes of everything else: "equal", it must be the same in all; "first" takes that of the
            first; "mean" averages what is floating point by count, and takes the rest from the first.

    Returns: a state_dict with the keys and dtypes of the first; `num_batches_tracked` is the sum.

    Raises:
        ValueError: no states; a count that is not positive, or less than 2 values; keys or shapes that differ; with
            "equal", a tensor that does. The message names it.

    Example:
        >>> import torch, batchnorm as bn
        >>> def state(mean, variance):
        ...     return {"running_mean": torch.tensor([mean]), "running_var": torch.tensor([variance])}
        >>> merged = bn.merge_states([(state(-1.0, 0.5), 1000.0), (state(1.0, 0.5), 1000.0)])
        >>> merged["running_mean"].item(), merged["running_var"].item()  # the average of the variances is 0.5
        (0.0, 1.5)
    """
    if parameters not in ("equal", "first", "mean"):
        raise ValueError(f'parameters must be "equal", "first" or "mean", got {parameters!r}')
    if not states:
        raise ValueError("there are no states to merge")
    parts, counts = [dict(state) for state, _ in states], [count for _, count in states]
    _check(parts, counts)
    first = parts[0]
    merged = dict(first)
    shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    for name in _layers(first):
        mean, variance = _merged(
            [part[name + _MEAN] for part in parts], [part[name + _VARIANCE] for part in parts], counts
        )
        merged[name + _MEAN] = mean.to(first[name + _MEAN])
        merged[name + _VARIANCE] = variance.to(first[name + _VARIANCE])
        if name + _BATCHES in first:
            merged[name + _BATCHES] = torch.stack([part[name + _BATCHES] for part in parts]).sum(0)
    statistics = {name + each for name in _layers(first) for each in (_MEAN, _VARIANCE, _BATCHES)}
    for key in first.keys() - statistics:
        tensors = [part[key] for part in parts]
        if parameters == "equal" and not all(torch.equal(each, tensors[0]) for each in tensors):
            raise ValueError(
                f'{key} differs between the states: parameters="mean" averages what is not statistics, "first" takes '
                "that of the first"
            )
        if parameters == "mean" and tensors[0].is_floating_point():
            weighted = (each.double() * share.item() for each, share in zip(tensors, shares, strict=True))
            merged[key] = torch.stack(list(weighted)).sum(0).to(tensors[0])
    return merged


def split_state(state: Mapping[str, Tensor]) -> tuple[State, State]:
    """What clients share and what each keeps (FedBN, Li et al. 2021): everything but batch normalization, and that.

    Args:
        state: of a model, all of whose batch normalization has running statistics, by which it is known.

    Returns: the tensors that are not of batch normalization, and those that are: weight, bias and statistics.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> shared, own = bn.split_state(model.state_dict())
        >>> sorted(shared), sorted(own)[:2]
        (['0.bias', '0.weight'], ['1.bias', '1.num_batches_tracked'])
    """
    layers = set(_layers(state))
    own = {key: tensor for key, tensor in state.items() if key.removesuffix(_last(key)) in layers}
    return {key: tensor for key, tensor in state.items() if key not in own}, own


def reduce_statistics(model: nn.Module, count: float = 1.0, group: Any = None) -> list[str]:
    """Give all ranks the running statistics of all, in place: those of the union of what they have seen.

    Ranks that train without synchronised statistics end with different ones. DistributedDataParallel takes those of
    rank 0; averaging mean and variance (timm's --dist-bn reduce) leaves out the variance between the ranks. Here they
    are merged as by `merge_states`, in float64, by one gather. Every rank must call it.

    Args:
        model: with layers that keep running statistics, of any class.
        count: the weight of this rank: how many values of a channel it has seen, or any number in proportion.
        group: of processes; None: all.

    Returns: the paths of the layers, all of them; without several processes nothing changes.

    Raises:
        ValueError: a count that is not positive, on any rank.

    Example:
        >>> import torch, batchnorm as bn
        >>> bn.reduce_statistics(torch.nn.Sequential(torch.nn.BatchNorm1d(4)))
        ['0']
    """
    layers: dict[str, Any] = {name: each for name, each in model.named_modules() if has_statistics(each)}
    if not layers or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        if not count > 0:
            raise ValueError(f"the count of a rank must be positive, got {count}")
        return list(layers)
    own = torch.cat(
        [
            each.double().flatten()
            for layer in layers.values()
            for each in (layer.running_mean, layer.running_var)
        ]
    )
    own = torch.cat([own.new_tensor([count]), own])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    counts = [float(each[0]) for each in gathered]
    if not all(each > 0 for each in counts):
        raise ValueError(f"the count of a rank must be positive, got {counts}")
    start = 1
    with torch.no_grad():
        for layer in layers.values():
            size = layer.running_mean.numel()
            means, variances = (
                [each[at : at + size].view_as(layer.running_mean) for each in gathered]
                for at in (start, start + size)
            )
            mean, variance = _merged(means, variances, counts)
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
            start += 2 * size
    return list(layers)


def _merged(means: list[Tensor], variances: list[Tensor], counts: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and variance of all together: unbiased ones of numbers of values, else of a mixture."""
    of_values = all(isinstance(count, int) for count in counts)
    bessel = 1 if of_values else 0
    parts = [
        Moments(
            torch.tensor([count], dtype=torch.float64),
            mean.double().flatten(),
            variance.double().flatten() * (count - bessel),
        )
        for mean, variance, count in zip(means, variances, counts, strict=True)
    ]
    whole = parts[0].merge(*parts[1:])
    variance = whole.m2 / (sum(counts) - bessel)
    return whole.mean.view_as(means[0]), variance.view_as(means[0])


def _layers(state: Mapping[str, Tensor]) -> list[str]:
    """The prefixes of the layers with running statistics, "layer1.bn." or ""."""
    names = [key.removesuffix(_MEAN) for key in state if _last(key) == _MEAN]
    return [name for name in names if name + _VARIANCE in state]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _check(parts: list[State], counts: list[float]) -> None:
    first = parts[0]
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        if not count > 0:
            raise ValueError(f"the count of a state must be positive, got {count} for number {number}")
        if all(isinstance(each, int) for each in counts) and count < 2:
            raise ValueError(
                f"statistics of {count} value have no variance (state number {number}): give its weight, {count}.0"
            )
        if part.keys() != first.keys():
            different = sorted(part.keys() ^ first.keys())
            raise ValueError(f"the states have different keys: {', '.join(different[:3])}")
        for key, tensor in part.items():
            if tensor.shape != first[key].shape:
                raise ValueError(
                    f"{key} has shape {tuple(tensor.shape)} in state number {number}, not {tuple(first[key].shape)}"
                )
