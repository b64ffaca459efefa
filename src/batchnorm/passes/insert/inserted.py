"""`model, report = insert(model, *inputs)`: batch normalization into a model that has none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from batchnorm import layers
from batchnorm.calibrate.batches import Forward
from batchnorm.graph.modules import is_compiled, refuse_lazy
from batchnorm.graph.nonlinearity import Place, places, recurrent
from batchnorm.graph.normalized import normalize, obstacle
from batchnorm.graph.observation import observe
from batchnorm.layers import _BatchNorm
from batchnorm.passes.fold.proof import copy_of, detached
from batchnorm.passes.insert.dropout import regularization
from batchnorm.passes.insert.functional_calls import FunctionalCalls
from batchnorm.passes.insert.identity import give_identity
from batchnorm.passes.insert.where import Choice, Where
from batchnorm.passes.report import LayerReport, Report
from batchnorm.passes.rollback import unchanged_on_failure

Model = TypeVar("Model", bound=nn.Module)

_RANKS = {3: layers.BatchNorm1d, 4: layers.BatchNorm2d, 5: layers.BatchNorm3d}


def insert(
    model: Model,
    *inputs: Any,
    where: Where = None,
    dropout: str | float = "drop",
    identity: Iterable[Any] | None = None,
    forward: Forward | None = None,
    options: dict[str, Any] | None = None,
    **keywords: Any,
) -> tuple[Model, Report]:
    """Put batch normalization before each nonlinearity of `model`, in place (Ioffe & Szegedy 2015, algorithm 2).

        z = g(Wu + b)    becomes    z = g(BN(Wu))

    The nonlinearities are found by running the model on example inputs, on a copy and in both modes: modules and
    functions, in any forward. The layer stands where Wu is computed, as the child `norm` of the convolution or linear
    module, which keeps its place, its name and the name of its weight; if a forward calls the operation itself, in the
    activation module. So a residual sum has it in its branches. The bias b goes, since β takes its place (section 3.2);
    dropout and local response normalization go too (section 4.2.1).

    Left alone, and named: recurrent cells, attention and what makes its weights, what is normalised already, outputs of
    the model, and modules that are called several times. Give the optimizer `bn.param_groups(model, ...)` afterwards.

    Args:
        model: any module, before it is wrapped in DistributedDataParallel and before its optimizer is made.
        inputs: of its forward, for example: a batch to train on.
        where: which of them, by what is normalised or by the nonlinearity behind it: names of modules, with all in
            them, or patterns ("features.*"); classes, Conv2d or ReLU; or a function of name and module, or of the
            module alone. A module that is named in full is taken though it makes an output, say.
        dropout: of the whole model, if anything is inserted: "drop", "keep", or the probability that it gets.
        identity: batches, as for `bn.population`, of a pre-trained model's data. γ and β are then those with which the
            model computes what it did: √(variance + eps) and mean of what each layer sees. Without it γ = 1, β = 0.
        forward: called with model and batch of `identity`, where that is not how the model is called.
        options: of the layers: eps, momentum, statistics, ...
        keywords: further inputs, by name.

    Returns: `model` itself, and a Report: "inserted", "removed" or "weakened", or "left alone" and why.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: nothing of that name; a module named in full that cannot have a layer; a model in
            DistributedDataParallel, compiled or lazy; no batches in `identity`. Nothing has been changed then.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 3))
        >>> model, report = bn.insert(model, torch.randn(4, 3, 9, 9))
        >>> report
        0  inserted    BatchNorm2d(8), its bias went
        2  left alone  makes an output of the model
        2 layers: 1 inserted, 1 left alone
        >>> sorted(name for name, _ in model[0].named_parameters())
        ['norm.bias', 'norm.weight', 'weight']
    """
    with torch.inference_mode(False):
        return _insert(model, inputs, keywords, where, dropout, identity, forward, options or {})


def _insert(
    model: Model,
    inputs: tuple[Any, ...],
    keywords: dict[str, Any],
    where: Where,
    dropout: str | float,
    identity: Iterable[Any] | None,
    forward: Forward | None,
    options: dict[str, Any],
) -> tuple[Model, Report]:
    _check_model(model)
    if dropout not in ("drop", "keep") and not (type(dropout) in (int, float) and 0 <= float(dropout) < 1):
        raise ValueError(f'dropout must be "drop", "keep" or a probability below 1, got {dropout!r}')
    found, dropping = _observed(model, inputs, keywords)
    modules = dict(model.named_modules())
    chosen = Choice.of(where)
    taken: dict[str, Place] = {}
    why: dict[str, str] = {}
    for path, place in found.items():
        reason = _reason(path, place, modules, chosen)
        if reason:
            why[path] = reason
        else:
            taken[path] = place
    chosen.check(taken, found, why)
    made = {path: _layer(place, modules[path], model, options) for path, place in taken.items()}
    if identity is not None:
        batches = [identity] if isinstance(identity, Tensor) else identity
        for path in give_identity(model, made, taken, batches, forward):
            del made[path], taken[path]
            why[path] = "is not called in evaluation, where the batches of identity= are measured"
    rows: dict[str, LayerReport] = {}
    with unchanged_on_failure(model):
        for path, layer in made.items():
            gone = _remove_bias(model, path, layer, taken[path], identity is not None)
            place = taken[path]
            assert place.value is not None
            normalize(modules[path], layer, place.of_input, place.dim, len(place.value.shape))
            what = f"{type(layer).__name__}({layer.num_features}){', its bias went' if gone else ''}"
            rows[path] = LayerReport(path, "inserted", what)
        if made:
            rows |= regularization(model, dropout, identity is not None)
    for path, reason in why.items():
        rows[path] = LayerReport(path, "left alone", why=reason)
    for path, reason in dropping.items() if made else ():
        rows.setdefault(path, LayerReport(path, "left alone", why=reason))
    for path, module in recurrent(model).items():
        rows.setdefault(path, LayerReport(path, "left alone", why=f"is recurrent ({type(module).__name__})"))
    order = {path: number for number, path in enumerate(modules)}
    return model, Report(tuple(sorted(rows.values(), key=lambda row: order.get(row.name, len(order)))))


def _reason(path: str, place: Place, modules: dict[str, nn.Module], chosen: Choice) -> str | None:
    """Why there is to be no layer, or None."""
    module = modules.get(path, modules[""])
    follower = place.nonlinearity
    taken = chosen.takes(path, module) or (follower in modules and chosen.takes(follower, modules[follower]))
    if not taken:
        return place.why or "where= leaves it out"
    if path not in modules:
        return place.why or "is no module of the model: a forward makes it, or has it in a list"
    in_full = chosen.names_in_full(path) or chosen.names_in_full(follower)
    if place.why and not (place.forced and place.value is not None and in_full):
        return place.why
    why = obstacle(module)
    if why is not None:
        return why
    value = place.value
    assert value is not None
    if place.dim == 1 and len(value.shape) not in _RANKS and len(value.shape) != 2:
        return f"makes a value of {len(value.shape)} dimensions, and a layer has 2 to 5"
    if not value.dtype.is_floating_point:
        return f"makes {value.dtype}, which no layer normalises"
    return None


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"insert takes a torch.nn.Module, not {type(model).__name__}")
    refuse_lazy(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("the model is compiled by torch.jit: insert before it is scripted or traced")
    for path, module in model.named_modules():
        name = type(module).__name__
        if (
            isinstance(module, nn.parallel.DistributedDataParallel)
            or "FullySharded" in name
            or "FSDP" in name
        ):
            raise ValueError(
                f"{path or 'the model'} is wrapped in {name}, which would not synchronise new parameters: insert into "
                "the module itself, then wrap it"
            )
        if is_compiled(module):
            raise ValueError(
                f"{path or 'the model'} is compiled: insert into the module itself, its _orig_mod"
            )


def _observed(
    model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[dict[str, Place], dict[str, str]]:
    """The places by path, of both modes; and what is dropped in a forward by a function, which stays."""
    given, named = detached((inputs, keywords))
    found: dict[str, Place] = {}
    functions = FunctionalCalls(model)
    biases: dict[str, set[str | None]] = {}
    for training in (True, False):
        running = copy_of(model).train(training)
        functions.model = running
        try:
            with functions:
                seen = observe(running, *given, **named)
        except Exception as error:
            mode = "training" if training else "evaluation"
            error.add_note(
                f"insert ran {type(model).__name__} on the example inputs in {mode} mode, as it has to see both: give "
                "a batch to train on"
            )
            raise
        for place in places(seen):
            biases.setdefault(place.path, set()).add(place.bias)
            known = found.get(place.path)
            if known is None or (not known.why and place.why):
                found[place.path] = place
        seen.forget()
    for path, place in found.items():  # one that is read elsewhere in the other mode stays
        if len(biases[path]) > 1:
            found[path] = replace(place, bias=None)
    dropping = {
        path: f"calls {' and '.join(names)} in its forward, which stays: take it out there"
        for path, names in functions.found.items()
    }
    return found, dropping


def _layer(place: Place, module: nn.Module, model: nn.Module, options: dict[str, Any]) -> _BatchNorm:
    """The layer for a place, with γ = 1 and β = 0."""
    value = place.value
    assert value is not None
    kind = layers.BatchNorm1d if place.dim == -1 else _RANKS.get(len(value.shape), layers.BatchNorm1d)
    own = next((p for each in (module, model) for p in each.parameters() if p.is_floating_point()), None)
    dtype = value.dtype if own is None else own.dtype
    options = {"device": None if own is None else own.device, "dtype": dtype} | options
    layer = kind(value.shape[place.dim], **options)
    return layer.train(module.training)


def _remove_bias(model: nn.Module, path: str, layer: _BatchNorm, place: Place, measured: bool) -> bool:
    """Remove the bias of a module whose output is normalised, if only that adds it; return whether it went."""
    module = model.get_submodule(path)
    bias = module._parameters.get("bias")
    if bias is None or place.bias != f"{path}.bias".removeprefix(".") or bias.shape != (layer.num_features,):
        return False
    if not isinstance(
        module, (nn.Linear, nn.modules.conv._ConvNd)
    ):  # others may not know that it can be None
        return False
    holders = [each for each in model.modules() if any(own is bias for own in each._parameters.values())]
    if len(holders) > 1:
        return False
    if measured and layer.running_mean is not None:
        layer.running_mean.copy_(
            (layer.running_mean.double() - bias.detach().double()).to(layer.running_mean)
        )
    module.register_parameter("bias", None)
    return True
