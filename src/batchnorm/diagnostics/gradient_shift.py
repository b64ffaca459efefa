"""How the gradient of a layer changes when the layers before it are updated: internal covariate shift as a number.

    G_i  = ∇_{W_i} L(W_1, …, W_k)
    G'_i = ∇_{W_i} L(W_1 updated, …, W_{i-1} updated, W_i, …, W_k),  of the same batch

Santurkar, Tsipras, Ilyas & Madry 2018, "How does batch normalization help optimization?", definition 2.1: the shift is
‖G_i - G'_i‖; they show the cosine of both beside it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.diagnostics.intact import intact
from batchnorm.diagnostics.sites import matching

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class GradientShift:
    """How the update of the layers before it changes the gradient of a layer.

    step: steps of training before it.
    layer: its path.
    norm: ‖G‖, the length of the gradient before the update.
    shift: ‖G - G'‖, where G' is the gradient after it.
    cosine: of the angle between both; nan if one of them is 0.
    """

    step: int
    layer: str
    norm: float
    shift: float
    cosine: float


def gradient_shifts(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    patterns: Iterable[str] | None,
    step: int,
) -> list[GradientShift]:
    """Of the layers that are meant, in the order in which they are called; everything is as before afterwards.

    patterns: of paths; None: the layers that have a matrix or a convolution.

    Raises: ValueError for a pattern that matches no layer with parameters in the optimizer, and for hooks that act.
    """
    if any(each._post_accumulate_grad_hooks for each in model.parameters()):
        raise ValueError(
            "hooks of parameters act in a backward pass, as an optimizer perhaps: nothing can be undone"
        )
    parameters = [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]
    values = [each.detach().clone() for each in parameters]
    called: dict[nn.Module, None] = {}
    try:
        gradients = _gradients(model, loss, parameters, called)
        updated = _updated(optimizer, dict(zip(parameters, gradients, strict=True)))
        layers = _layers(model, called, parameters)
        chosen = _chosen(layers, parameters, patterns)
        found = []
        for number, (path, members) in enumerate(layers.items()):
            one = [gradients[each] for each in members]
            if path in chosen and any(each is not None for each in one):
                after = _gradients(model, loss, parameters) if number else gradients
                found.append(GradientShift(step, path, *_compared(one, [after[each] for each in members])))
            chosen.discard(path)
            if not chosen:
                break
            for each in members:
                _write(parameters[each], updated[parameters[each]])
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            _write(parameter, value)
        torch.clear_autocast_cache()
    return found


def _gradients(
    model: nn.Module, loss: Loss, parameters: Sequence[Tensor], called: dict[nn.Module, None] | None = None
) -> list[Tensor | None]:
    """Of one evaluation of the loss, which begins with the same buffers and random numbers each time.

    called: gets the modules, in the order of their first calls.
    """
    buffers = [(each, each.clone()) for each in model.buffers()]
    with intact(model), torch.enable_grad():
        if called is not None:
            order = called
            for module in model.modules():  # intact() takes the hooks away again
                module.register_forward_pre_hook(lambda module, _: order.setdefault(module))
        torch.clear_autocast_cache()  # of weights that have changed since, where the caller is inside of an autocast
        try:
            value = loss()
            with _without_gradients([*parameters, *_leaves(value)]):
                value.backward()
                return [None if each.grad is None else each.grad.detach().clone() for each in parameters]
        finally:
            for buffer, values in buffers:
                _write(buffer, values)


@contextmanager
def _without_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Tensors begin without a gradient, and have their own again afterwards."""
    before = [(each, each.grad) for each in tensors]
    for each in tensors:
        each.grad = None
    try:
        yield
    finally:
        for each, gradient in before:
            each.grad = gradient


def _leaves(value: Tensor) -> list[Tensor]:
    """The tensors to which a backward pass adds gradients: those of another network too, as a discriminator."""
    found, seen, waiting = [], set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [each for each, _ in node.next_functions]
        if hasattr(node, "variable"):
            found.append(node.variable)
    return list({id(each): each for each in found}.values())


def _updated(
    optimizer: torch.optim.Optimizer, gradients: dict[Tensor, Tensor | None]
) -> dict[Tensor, Tensor]:
    """What the optimizer makes of its parameters; a copy of it does, of copies of them, without anyone's hooks."""
    twin = object.__new__(type(optimizer))
    own = vars(optimizer)
    vars(twin).update(
        {name: each for name, each in own.items() if name != "step"}
    )  # a schedule counts its calls
    vars(twin).update({name: OrderedDict() for name in own if name.endswith("_hooks")})
    vars(twin).update(copy.deepcopy({name: own[name] for name in ("state", "param_groups")}))
    copies = {
        one: other
        for group, same in zip(optimizer.param_groups, twin.param_groups, strict=True)
        for one, other in zip(group["params"], same["params"], strict=True)
    }
    for one, other in copies.items():
        other.grad = gradients.get(one)
    twin.step()
    return {one: other.detach() for one, other in copies.items()}


def _layers(
    model: nn.Module, called: Iterable[nn.Module], parameters: Sequence[Tensor]
) -> dict[str, list[int]]:
    """The numbers of the parameters of each layer, by its path, in the order of the first calls.

    A parameter is the layer's that has it, or of the module around it, where that one is never called: the output
    projection of torch's attention. Of several that share it, it is the first one's.
    """
    modules = dict(model.named_modules())
    order = {module: number for number, module in enumerate(called)}
    number_of = {id(each): number for number, each in enumerate(parameters)}
    owners = []
    for path, module in modules.items():
        own = [number_of[id(each)] for each in module._parameters.values() if id(each) in number_of]
        while own and path and modules[path] not in order:
            path = path.rpartition(".")[0]
        owners.append((order.get(modules[path], len(order)), path, own))
    found: dict[str, list[int]] = {}
    taken: set[int] = set()
    for _, path, own in sorted(owners, key=lambda each: each[0]):
        new = [each for each in own if each not in taken]
        taken.update(new)
        if new:
            found.setdefault(path, []).extend(new)
    return found


def _chosen(
    layers: dict[str, list[int]], parameters: Sequence[Tensor], patterns: Iterable[str] | None
) -> set[str]:
    if patterns is None:
        return {path for path, own in layers.items() if any(parameters[each].dim() > 1 for each in own)}
    chosen: set[str] = set()
    for pattern in patterns:
        meant = matching(pattern, layers)
        if not meant:
            raise ValueError(
                f"no layer that the optimizer updates has a path like {pattern!r}: there are "
                f"{', '.join(filter(None, layers))}"
            )
        chosen |= meant
    return chosen


def _compared(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> tuple[float, float, float]:
    """‖G‖, ‖G - G'‖ and the cosine of both."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None or b is not None]
    before, after = (torch.cat([_numbers(pair[side], pair[1 - side]) for pair in pairs]) for side in (0, 1))
    lengths = before.norm() * after.norm()
    return float(before.norm()), float((before - after).norm()), float(before @ after / lengths)


def _numbers(gradient: Tensor | None, like: Tensor | None) -> Tensor:
    """In float64 on the CPU; none is 0."""
    if gradient is None:
        assert like is not None
        gradient = torch.zeros_like(like)
    return gradient.to_dense().cpu().double().flatten()


def _write(tensor: Tensor, value: Tensor) -> None:
    # by .data, which autograd does not count as a change: the caller's own forward pass may wait for its backward
    tensor.data.copy_(value)
