"""What each column of the table in docs/statistics.md asks, of any statistics; each a function of them that raises."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from tests.statistics.formulas import (
    Kind,
    affine,
    check,
    data,
    evaluated,
    layer_of,
    mine,
    moments,
    near,
    near_all,
    normal,
    ranks,
    summed,
    valid,
)

Part = Callable[[Kind], None]
COLUMNS: dict[str, list[Part]] = {}


def column(name: str, **parts: Any) -> Callable[[Any], Any]:
    """Each value of a keyword is a part of the cell: what is refused, is refused in every one."""

    def add(ask: Any) -> Any:
        COLUMNS[name] = [
            partial(ask, **{key: value}) for key, values in parts.items() for value in values
        ] or [ask]
        return ask

    return add


def network(kind: Kind) -> Any:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        bn.BatchNorm2d(4, activation="relu", statistics=kind),
        nn.Conv2d(4, 3, 3),
        bn.BatchNorm2d(3, statistics=kind),
    ).double()


def alone(kind: Kind) -> Kind:
    """What does with the whole batch in one process what `kind` does on ranks."""
    return None if isinstance(kind, bn.Sync) else kind


@column("residual/activation", activation=["relu", "silu"])
def residual_and_activation(kind: Kind, activation: str) -> None:
    for shape in ((13, 3), (13, 3, 7), (13, 3, 5, 4), (13, 3, 2, 3, 4)):
        function = getattr(torch.nn.functional, activation)
        check(layer_of(kind, activation=activation), shape, activation=function, residual=True)


@column("mask")
def masks(kind: Kind) -> None:
    check(layer_of(kind), mask=valid(13, 1, 5, 4))
    check(layer_of(kind, activation="relu"), mask=valid(13, 1, 5, 4), activation=torch.relu, residual=True)
    lengths = torch.tensor([3, 5, 1, 2, 0, 0, 3, 2, 1, 5, 2, 4, 3])
    mask = (torch.arange(5) < lengths[:, None])[:, None]
    layer = layer_of(kind)
    check(layer, (13, 3, 5), mask=mask, call=lambda layer, x, *_: layer(x, mask=mine(lengths)))
    x = torch.where(mask, data(13, 3, 5), torch.nan)
    near(layer.eval()(mine(x), mask=mine(lengths)), mine(torch.where(mask, evaluated(layer, x), 0)))


@column("per-activation")
def per_activation(kind: Kind) -> None:
    mask = torch.rand(13, 1, 2, 3, generator=torch.Generator().manual_seed(7)) > 0.1
    layer = layer_of(kind, (3, 2, 3))
    check(layer, (13, 3, 2, 3))
    check(layer, (13, 3, 2, 3), mask=mask, seed=1)
    x = data(13, 3, 2, 3)
    running = (layer.running_var + layer.eps).sqrt()
    near(layer.eval()(x), (x - layer.running_mean) / running * layer.weight + layer.bias)


@column("named domain")
def named_domain(kind: Kind) -> None:
    layer = layer_of(kind)
    own = [layer.running_mean.clone(), layer.running_var.clone()]
    with bn.domain("a"):
        started = copy.deepcopy(layer)  # by its first batch, the other by being asked
        near_all(layer.running_statistics(), [torch.zeros(3), torch.ones(3)])
        its = layer.domains["a"]
        check(layer, its=its)
        if isinstance(kind, bn.Population):
            with pytest.raises(RuntimeError, match="no running statistics of domain 'a'"):
                started(data(13, 3, 5, 4))
        else:
            started(mine(data(13, 3, 5, 4)))
            near_all(started.domains["a"].buffers(), its.buffers())
        check(layer, its=its, seed=1)
    near_all([layer.running_mean, layer.running_var], own)
    x = data(5, 3, 4)
    near(layer.eval()(x), evaluated(layer, x))
    with bn.domain("a"):
        running = its.running_mean, its.running_var
        near(layer(x), affine(normal(bn.Population(), x, running), layer.weight, layer.bias))
    with bn.domain("b"), pytest.raises(RuntimeError, match="no running statistics of domain 'b'"):
        layer(x)


@column("debiased/cumulative", debiased=[True, False])
def debiased_and_cumulative(kind: Kind, debiased: bool) -> None:
    layer = layer_of(kind, **({"debiased": True} if debiased else {"momentum": None}))
    batches = []
    for n in (1, 2, 3):
        batches.append(check(layer, seed=n, rate=0.1 / (1 - 0.9**n) if debiased else 1 / n))
    weights = [0.81, 0.9, 1] if debiased else [1, 1, 1]
    for found, of_batches in zip(
        (layer.running_mean, layer.running_var), zip(*batches, strict=True), strict=True
    ):
        near(found, sum(w * t for w, t in zip(weights, of_batches, strict=True)) / sum(weights))


@column("on_single")
def on_single(kind: Kind) -> None:
    """One value of all ranks; the rank without it has no samples."""
    kind, samples = (replace(kind, size=1), 4) if isinstance(kind, bn.Ghost) else (kind, 1)
    one = torch.zeros(samples, 1, 4, dtype=torch.bool)
    one[:, :, 0] = True
    for x, mask in ((data(samples, 3), None), (data(samples, 3, 4), one)):
        if not isinstance(kind, bn.Population):
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                layer_of(kind)(mine(x), mask=mine(mask))
        layer = layer_of(kind, on_single="raise" if isinstance(kind, bn.Population) else "running")
        before, own = copy.deepcopy(layer.state_dict()), mine(x).requires_grad_()
        y, expected = layer(own, mask=mine(mask)), evaluated(layer, own)
        expected = expected if mask is None else torch.where(mine(mask), expected, 0)
        near(y, expected)
        near(*(torch.autograd.grad(t.square().sum(), own)[0] for t in (y, expected)))
        near_all(layer.state_dict().values(), before.values())


@column("virtual_batch")
def virtual(kind: Kind) -> None:
    one, two = network(alone(kind)), network(kind)
    x, weights = data(13, 2, 6, 6), data(13, 3, 4, 4, seed=1)
    (one(x) * weights).sum().backward()
    own = [mine(t) for t in (x, weights)]
    micro, its = (t.split([2, 1, len(t) - 3]) for t in own)
    with bn.virtual_batch(two, micro):
        for part, weight in zip(micro, its, strict=True):
            (two(part) * weight).sum().backward()
    near_all([summed(p.grad) for p in two.parameters()], [p.grad for p in one.parameters()])
    near_all(two.buffers(), one.buffers())


@column("freeze")
def frozen(kind: Kind) -> None:
    model, x = network(kind), mine(data(13, 2, 6, 6))
    model(x)
    bn.freeze(model)[0].train()
    other, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    layer, inner = model[1], data(13, 4, 5, 6)
    own, expected = (inner.clone().requires_grad_() for _ in range(2))
    y = layer(own)
    of_formula = evaluated(layer, expected).relu()
    near(y, of_formula)
    near(*(torch.autograd.grad(t.square().sum(), z)[0] for t, z in ((y, own), (of_formula, expected))))
    near(model(x), copy.deepcopy(model).eval()(x))
    near_all(model.state_dict().values(), before.values())
    bn.unfreeze(model)
    assert model[1].statistics == (None if isinstance(kind, bn.Population) else kind), "unfrozen"
    thawed = network(model[1].statistics)
    thawed.load_state_dict(other.state_dict())
    near(model(x), thawed(x))
    near_all(model.buffers(), thawed.buffers())


@column("adapt")
def adapted(kind: Kind) -> None:
    model, x = network(kind), data(13, 2, 6, 6)
    for prior in (0, 5):
        before = [buffer.clone() for buffer in model.buffers()]
        result = bn.adapt(model, [mine(x)], prior)
        assert result.samples == 13 and model[1].statistics == kind and model.training, "what adapt leaves"
        inner = x
        for conv, layer in zip(model[::2], model[1::2], strict=True):
            inner = conv(inner)
            count, mean, variance = moments(inner)
            share = 13 / (13 + prior)  # a new layer's own are 0 and 1
            near(layer.running_mean, share * mean)
            near(layer.running_var, share * variance * count / (count - 1) + (1 - share))
            inner = affine(normal(None, inner, (0, 1)), layer.weight, layer.bias).relu()
        result.reset()
        assert all(map(torch.equal, model.buffers(), before)), "reset"


@column("eval/fold")
def evaluation(kind: Kind) -> None:
    layer, x = layer_of(kind), data(13, 3, 4)
    layer(mine(data(13, 3, 4, seed=1)))
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    near(layer(x), evaluated(layer, x))
    running = layer.running_mean, layer.running_var
    near(layer(x), bn.Affine.normalising(*running, layer.weight, layer.bias, layer.eps)(x))
    near_all(layer.state_dict().values(), before.values())


@column("double backward", mask=[None, valid(13, 1, 4)])
def double_backward(kind: Kind, mask: Tensor | None) -> None:
    layer = layer_of(kind, activation="sigmoid")
    x, dy, ddx = (data(13, 3, 4, seed=seed).requires_grad_() for seed in range(3))
    running = layer.running_mean.clone(), layer.running_var.clone()
    weight = layer.weight.detach().clone().requires_grad_()
    y = affine(normal(kind, x, running, mask), weight, layer.bias.detach()).sigmoid()
    y = y if mask is None else torch.where(mask, y, 0)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    expected = torch.autograd.grad(dx, [x, dy, weight], ddx)
    own, own_dy = (mine(t.detach()).requires_grad_() for t in (x, dy))
    (found_dx,) = torch.autograd.grad(layer(own, mask=mine(mask)), own, own_dy, create_graph=True)
    near(found_dx, mine(dx))
    found = torch.autograd.grad(found_dx, [own, own_dy, layer.weight], mine(ddx.detach()))
    near_all([found[0], found[1], summed(found[2])], [mine(expected[0]), mine(expected[1]), expected[2]])


def of_models(transform: Any, kind: Kind) -> None:
    """Gradients of a model, or of several that are stacked, beside those of each by formula."""
    x, models = mine(data(13, 3, 4)), [layer_of(kind, seed=seed) for seed in range(3)]
    parameters, buffers = stack_module_state(models)
    before = {name: values.clone() for name, values in buffers.items()}
    any_of_them = layer_of(kind)

    def loss(parameters: Any, buffers: Any) -> Any:
        return functional_call(any_of_them, (parameters, buffers), (x,)).sin().sum()

    found = transform(loss)(parameters, buffers)
    for k, layer in enumerate(models):
        running = before["running_mean"][k], before["running_var"][k]
        y = affine(normal(kind, x, running), layer.weight, layer.bias)
        expected = torch.autograd.grad(y.sin().sum(), [layer.weight, layer.bias])
        near_all([found["weight"][k], found["bias"][k]], expected)
        layer(x)  # its running statistics are looked at elsewhere
        for name, values in layer.named_buffers():
            near(buffers[name][k], values)


def one_by_one(loss: Any) -> Any:
    def gradients(parameters: Any, buffers: Any) -> Any:
        each = [
            grad(loss)(*({name: values[k] for name, values in of.items()} for of in (parameters, buffers)))
            for k in range(3)
        ]
        return {name: torch.stack([its[name] for its in each]) for name in parameters}

    return gradients


def over_batches(kind: Kind) -> None:
    if isinstance(kind, bn.Renorm):
        return  # which has to track
    layer = layer_of(kind, track_running_stats=isinstance(kind, bn.Population))
    x = mine(data(13, 3, 4))
    running = layer.running_mean, layer.running_var
    found = vmap(layer)(torch.stack([x, 2 * x + 1]))
    for y, own in zip(found, (x, 2 * x + 1), strict=True):
        near(y, affine(normal(kind, own, running), layer.weight, layer.bias))


@column(
    "vmap/torch.func",
    ask=[partial(of_models, one_by_one), partial(of_models, lambda loss: vmap(grad(loss))), over_batches],
)
def transformed(kind: Kind, ask: Part) -> None:
    ask(kind)


@column("compile", masked=[False, True])
def compiled(kind: Kind, masked: bool) -> None:
    """For Renorm as inductor does it, which reorders what reads and writes the running statistics."""
    torch._dynamo.reset()
    backend = "inductor" if isinstance(kind, bn.Renorm) else "aot_eager"
    layer = layer_of(kind, activation="relu")
    whole: Any = torch.compile(layer, backend=backend, fullgraph=True)

    def call(_: Any, x: Any, residual: Any, mask: Any) -> Any:
        return whole(x, residual, mask)

    mask = valid(13, 1, 5, 4) if masked else None
    for seed in range(2):
        check(layer, call=call, mask=mask, activation=torch.relu, residual=True, seed=seed)


@column("checkpointing", reentrant=[True, False])
def checkpointed(kind: Kind, reentrant: bool) -> None:
    def call(layer: Any, *given: Any) -> Any:
        return checkpoint(layer, *given, use_reentrant=reentrant)

    layer = layer_of(kind, activation="relu")
    check(layer, call=call, mask=valid(13, 1, 5, 4), activation=torch.relu, residual=True)


@column("DDP")
def in_parallel(kind: Kind) -> None:
    """Of two steps, the second with two forward passes: what DDP broadcasts between them, the first has used."""
    parallel, model = network(kind), network(alone(kind))
    wrapped = DistributedDataParallel(parallel)
    together = isinstance(kind, bn.Sync)
    part = (lambda t: t) if together else mine
    for step, passes in ((0, 1), (1, 2)):
        batches = [data(13, 2, 6, 6, seed=10 * step + k) for k in range(passes)]
        weights = data(13, 3, 4, 4, seed=5)
        wrapped.zero_grad()
        model.zero_grad()
        torch.stack([(wrapped(mine(x)) * mine(weights)).sum() for x in batches]).sum().backward()
        outputs = []
        for x in batches:
            if not together:
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)
            outputs.append(model(part(x)))
        torch.stack([(y * part(weights)).sum() for y in outputs]).sum().backward()
        near_all(parallel.buffers(), model.buffers())
        for a, b in zip(parallel.parameters(), model.parameters(), strict=True):
            near(a.grad, (b.grad if together else summed(b.grad)) / ranks())
    of_ranks = [torch.empty_like(parallel[1].running_mean) for _ in range(ranks())]
    dist.all_gather(of_ranks, parallel[1].running_mean)
    same = isinstance(kind, bn.Sync | bn.Population)
    assert torch.equal(*of_ranks) == same, "whether ranks have equal statistics"


def through_file(layer: Any) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_state_dict(layer: Any) -> Any:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = layer_of(layer.statistics, seed=9, debiased=True, on_single="running")
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@column(
    "deepcopy/pickle/state_dict",
    copied=[
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        through_file,
        through_state_dict,
    ],
)
def copies(kind: Kind, copied: Any) -> None:
    layer = layer_of(kind, debiased=True, on_single="running")
    plain = layer_of(kind).state_dict()
    assert plain.keys() == nn.BatchNorm1d(3).state_dict().keys(), "keys of the state_dict"
    layer(mine(data(13, 3, 4)))
    with bn.domain("a"):
        layer.running_statistics()  # for Population, which begins no set
        layer(mine(data(13, 3, 4, seed=1)))
    other = copied(layer)
    assert (other.statistics, other.debiased, other.on_single) == (kind, True, "running"), "settings"
    assert other.running_mean.data_ptr() != layer.running_mean.data_ptr(), "one buffer of two layers"
    for name in (None, "a"):
        with bn.domain(name):
            x = mine(data(13, 3, 4, seed=2))
            near(other(x), layer(x))
            near(other.eval()(x), layer.eval()(x))
        other.train()
        layer.train()
    near_all(other.state_dict().values(), layer.state_dict().values())
