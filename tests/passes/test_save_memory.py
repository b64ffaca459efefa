"""`save_memory`: the same bits with less kept; what is kept is counted by hooks of the tests' own around it."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.kernels import recipes
from tests.kernels.processes import said
from tests.mutations.mutation import Mutation

MUTATIONS = [
    Mutation(
        "a change in place goes unseen",
        "kernels/recipes.py",
        "if self.tensor._version != self.version:",
        "if False:",
        why="autograd does not look at what hooks saved: gradients would be wrong without a word",
    ),
    Mutation(
        "a tensor changed in place is made again as it was",
        "kernels/recipes.py",
        "entry.version != tensor._version or",
        "",
        why="an activation in place would be taken for its input",
    ),
    Mutation(
        "what was made stays",
        "kernels/recipes.py",
        "            self.made, self.waiting = None, self.users\n",
        "            self.waiting = self.users\n",
        why="a retained graph would hold the outputs that it was to spare",
    ),
    Mutation(
        "a long chain is held at once",
        "kernels/recipes.py",
        "    if length <= _CHAIN:\n",
        "    if True:\n",
        why="the outputs of a stage of a ResNet-152 would all be there at its beginning",
    ),
    Mutation(
        "weights are those of the backward pass",
        "kernels/node.py",
        "values.detach().clone() for values in (weight, bias)",
        "values for values in (weight, bias)",
        why="after a step of the optimizer the output would be made of other weights",
    ),
    Mutation(
        "an exception leaves the recording open",
        "passes/save_memory.py",
        ", always_call=True",
        "",
        why="what is computed next, of any model, would be recorded and held",
    ),
]

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small(*after: nn.Module, activation: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        activation or nn.ReLU(),
        *after,
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 4, 1),
    )


def step(model: Any, x: Tensor = X, call: Callable[[Tensor], Any] | None = None) -> list[Any]:
    """Output, gradients and buffers after a forward and backward pass."""
    model.zero_grad()
    torch.manual_seed(1)
    y = (call or model)(x)
    y = y if isinstance(y, Tensor) else y[0]
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def equal(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How many tensors are saved as they are, and how many as recipes, and the bytes of the former."""
    found = {"kept": 0, "again": 0, "bytes": 0}
    seen = set()
    pack = recipes.Recording.pack

    def counting(self: recipes.Recording, tensor: Tensor) -> recipes.Saved:
        saved = pack(self, tensor)
        waiting.append(saved)
        return saved

    waiting: list[recipes.Saved] = []
    recipes.Recording.pack = counting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        recipes.Recording.pack = pack  # type: ignore[method-assign]
        for saved in waiting:
            found["again" if saved.tensor is None else "kept"] += 1
            if saved.tensor is not None:
                storage = saved.tensor.untyped_storage()
                if storage._cdata not in seen:
                    seen.add(storage._cdata)
                    found["bytes"] += storage.nbytes()


def saved_bytes(model: nn.Module, x: Tensor = X) -> int:
    """The bytes of the storages that a plain forward pass of `model` saves."""
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    del y
    return sum(storage.nbytes() for storage in found.values())


def spared_bytes(model: nn.Module, x: Tensor = X) -> int:
    """The same of a model after save_memory."""
    with counted() as found:
        y = model(x)
    del y
    return found["bytes"]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
    "densenet121": torchvision.models.densenet121,
    "vgg11_bn": torchvision.models.vgg11_bn,
    "googlenet": lambda: torchvision.models.googlenet(aux_logits=False, init_weights=False),
    "shufflenet": torchvision.models.shufflenet_v2_x0_5,
    "efficientnet_b0": torchvision.models.efficientnet_b0,
    "regnet_y_400mf": torchvision.models.regnet_y_400mf,
    "mnasnet": torchvision.models.mnasnet0_5,
}
# what remains of the bytes that are saved, as torch's layers and upgraded, with room of a tenth
REMAINS = {
    "mobilenet_v2": 0.55,
    "mobilenet_v3_small": 0.65,
    "resnet18": 0.7,
    "resnet50": 0.62,
    "densenet121": 0.45,
    "vgg11_bn": 0.75,
    "googlenet": 0.75,
    "shufflenet": 0.65,
    "efficientnet_b0": 0.65,
    "regnet_y_400mf": 0.65,
    "mnasnet": 0.65,
}


@pytest.mark.parametrize("upgraded", [True, False], ids=["upgraded", "torch"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_the_same_bits_and_keep_less(name: str, upgraded: bool) -> None:
    torch.manual_seed(0)
    plain = NETWORKS[name]()
    if upgraded:
        plain, _ = bn.upgrade(plain)
    saved, report = bn.save_memory(copy.deepcopy(plain))
    assert report.count("recomputed") == len(report.layers)
    x = torch.randn(2, 3, 64, 64)
    weights = sum(p.nbytes for p in plain.parameters())
    before, after = saved_bytes(copy.deepcopy(plain), x), spared_bytes(copy.deepcopy(saved), x)
    assert after - weights < REMAINS[name] * (before - weights)
    for _ in range(2):
        assert equal(step(plain, x), step(saved, x))


LAYER_ACTIVATIONS: list[Any] = [None, "relu", "leaky_relu", "relu6", "silu", "sigmoid", "tanh"]
LAYER_ACTIVATIONS += [nn.LeakyReLU(0.3), nn.GELU(), nn.Hardswish(), nn.Mish(), nn.ELU()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", LAYER_ACTIVATIONS, ids=str)
def test_each_activation_of_a_layer(activation: Any, layout: torch.memory_format, dtype: torch.dtype) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 3), bn.BatchNorm2d(8, activation=activation)
            self.last, self.end = nn.Conv2d(8, 8, 3, padding=1), bn.BatchNorm2d(8, activation=activation)
            self.out = nn.Conv2d(8, 2, 1)

        def forward(self, x: Any) -> Any:
            a = self.norm(self.first(x))
            return self.out(self.end(self.last(a), a))

    torch.manual_seed(0)
    plain = Net().to(dtype).to(memory_format=layout)
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    x = X.to(dtype).contiguous(memory_format=layout)
    assert equal(step(plain, x), step(saved, x))
    with counted() as found:
        saved(x)
    large = plain.norm(plain.first(x)).nbytes
    # two convolutions' outputs; the inputs of the last two convolutions are made again
    assert found["bytes"] < 2 * large + x.nbytes + 20_000


@pytest.mark.parametrize(
    "layer",
    [
        lambda: bn.BatchNorm2d(8, activation="relu", statistics=bn.Ghost(2)),
        lambda: bn.BatchNorm2d(8, activation="relu", statistics=bn.Renorm()),
        lambda: bn.BatchNorm2d(8, activation="relu", statistics=bn.Population()),
        lambda: bn.BatchNorm2d(8, activation="relu", statistics=bn.Sync()),
        lambda: bn.BatchNorm2d(8, activation="relu", debiased=True),
        lambda: bn.BatchNorm2d(8, affine=False),
        lambda: bn.BatchNorm2d(8, track_running_stats=False),
        lambda: bn.BatchNorm2d(8).eval(),
        lambda: nn.BatchNorm2d(8).eval(),
        lambda: nn.BatchNorm2d(8, affine=False),
        lambda: nn.BatchNorm2d(8, track_running_stats=False),
    ],
)
def test_each_kind_of_layer(layer: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), layer(), nn.Conv2d(8, 2, 1))
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    for _ in range(2):
        assert equal(step(plain), step(saved))
    with counted() as found:
        saved(X)
    assert found["again"] == 1


@pytest.mark.parametrize("kernels", ["native", "torch", "reference"])
@pytest.mark.parametrize("fixed", [False, True])
def test_masks(kernels: Any, fixed: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = (
                nn.Conv1d(3, 8, 3, padding=1),
                bn.BatchNorm1d(8),
                nn.Conv1d(8, 2, 1),
            )

        def forward(self, x: Any) -> Any:
            return self.last(self.norm(self.first(x), mask=torch.tensor([5, 9, 2])))

    torch.manual_seed(0)
    plain = Net()
    if fixed:
        plain.norm.eval()
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    x = torch.randn(3, 3, 9)
    with bn.kernels.use(kernels):
        assert equal(step(plain, x), step(saved, x))


ACTIVATIONS = "relu relu6 hardtanh leaky_relu elu celu selu silu mish hardswish hardsigmoid"
# what is no pass over memory, draws random numbers or writes into a part: the result is kept
KEPT = "pooling, average pooling, dropout, channels dropped, stochastic depth, relu in place of a view, written into"
KEPT += ", softmax, square"


def _functions() -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    for name in ACTIVATIONS.split():
        function = getattr(F, name)
        yield name, function
        yield f"{name} in place", partial(function, inplace=True)
    for name in ("relu", "sigmoid", "tanh", "neg"):
        yield f"Tensor.{name}", getattr(Tensor, name)
        yield f"Tensor.{name}_", getattr(Tensor, name + "_")
        yield f"torch.{name}", getattr(torch, name)
        yield f"torch.{name}_", getattr(torch, name + "_")
    yield "gelu", F.gelu
    yield "+ 1", lambda x: x + 1
    yield "+ itself", lambda x: x + x
    yield "+= 1", lambda x: x.__iadd__(1)
    yield "* gate", lambda x: x * x.mean((2, 3), keepdim=True).sigmoid()
    yield "*= constant gate", lambda x: x.mul_(torch.full((1, 8, 1, 1), 2.0))
    yield "/ 3", lambda x: x / 3
    yield "1 - x", lambda x: 1 - x
    yield "clamp", lambda x: x.clamp(-1, 1)
    yield "where", lambda x: torch.where(x > 0, x, 0.1 * x)
    yield "pad", lambda x: F.pad(x, (1, 1, 1, 1))
    yield "pad by reflection", lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")
    yield "cat", lambda x: torch.cat([x[:, :4], x[:, 4:]], 1)
    yield "cat with another", lambda x: torch.cat([x[:, 4:].contiguous(), x[:, :4].relu()], dim=1)
    yield "shuffle", lambda x: x.view(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).contiguous().view(x.shape)
    yield "chunks", lambda x: torch.cat([part.relu() for part in x.chunk(2, 1)], 1)
    yield "flip by view", lambda x: x.transpose(2, 3)
    yield "expand", lambda x: x[:, :1].expand(-1, 8, -1, -1)
    yield "clone", lambda x: x.clone()
    yield "channels-last", lambda x: x.contiguous(memory_format=torch.channels_last)
    yield "pooling", lambda x: F.max_pool2d(x, 2)
    yield "average pooling", lambda x: F.avg_pool2d(x, 3, 1, 1)
    yield "dropout", lambda x: F.dropout(x, 0.5)
    yield "channels dropped", lambda x: F.dropout2d(x, 0.5)
    yield "stochastic depth", lambda x: torchvision.ops.stochastic_depth(x, 0.5, "row") + x
    yield "relu in place of a view", lambda x: (x[:, :4].relu_(), x)[1]
    yield "relu in place after use", lambda x: (x.sigmoid() + x).relu_()
    yield "written into", lambda x: torch.cat([x, x]).copy_(torch.cat([x, -x]))[: len(x)]
    yield "softmax", lambda x: x.softmax(1)
    yield "square", lambda x: x.square()


class _Between(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], layer: type[nn.Module]) -> None:
        super().__init__()
        self.function = function
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), layer(8), nn.Conv2d(8, 4, 3)

    def forward(self, x: Any) -> Any:
        return self.last(self.function(self.norm(self.first(x))))


@pytest.mark.parametrize("layer", [bn.BatchNorm2d, nn.BatchNorm2d], ids=["ours", "torch"])
@pytest.mark.parametrize(("name", "function"), list(_functions()))
def test_what_is_between_a_layer_and_the_next(name: str, function: Any, layer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    plain = _Between(function, layer)
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    assert equal(step(plain), step(saved))
    if layer is nn.BatchNorm2d and name not in KEPT.split(", "):
        large = plain.first(X).nbytes
        with counted() as found:
            saved(X)
        assert found["bytes"] < 1.5 * large + X.nbytes + 8_000  # the convolution's output alone


class _Residual(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(blocks))
        self.norms = nn.ModuleList(bn.BatchNorm2d(3, activation="relu") for _ in range(blocks))

    def forward(self, x: Any) -> Any:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x), x)
        return x


def test_a_chain_is_made_again_in_parts() -> None:
    """Of n outputs, each made from the one before, some 2·√n are held at once, and each is made twice at most."""
    torch.manual_seed(0)
    blocks = 49
    plain = _Residual(blocks)
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    made: list[weakref.ref[Tensor]] = []
    most = [0]
    of = recipes.Recipe._from

    def watched(self: recipes.Recipe, values: dict[int, Tensor]) -> Tensor:
        result = of(self, values)
        made.append(weakref.ref(result))
        most[0] = max(most[0], sum(each() is not None for each in made))
        return result

    recipes.Recipe._from = watched  # type: ignore[method-assign]
    try:
        found = step(saved)
    finally:
        recipes.Recipe._from = of  # type: ignore[method-assign]
    assert equal(step(plain), found)
    assert len(made) <= 2 * blocks
    assert most[0] <= 2 * 7 + 4


def objects() -> int:
    """How many are there of what a recording makes, those of other tests included."""
    gc.collect()
    return sum(type(each) in (recipes.Saved, recipes.Recipe) for each in gc.get_objects())


def test_nothing_is_left_after_a_backward_pass() -> None:
    saved, _ = bn.save_memory(small())
    assert recipes.active() is None
    before = objects()
    y = saved(X)
    assert recipes.active() is None
    assert objects() > before
    y.sum().backward()
    assert objects() == before


def test_a_retained_graph_is_walked_again_and_holds_nothing_made() -> None:
    plain = small()
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    grads = []
    for model in (plain, saved):
        y = model(X).square().mean()
        for _ in range(3):
            y.backward(retain_graph=True)
        if model is saved:
            held = [each for each in gc.get_objects() if type(each) is recipes.Recipe]
            assert held
            assert all(each.made is None for each in held)
        grads.append([p.grad for p in model.parameters()])
    assert equal(*grads)


def test_parts_of_the_gradient() -> None:
    plain = small()
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    found = []
    for model in (plain, saved):
        y = model(X).square().mean()
        first = torch.autograd.grad(y, [model[4].weight], retain_graph=True)
        rest = torch.autograd.grad(y, list(model.parameters()))
        found.append([*first, *rest])
    assert equal(*found)


def test_gradients_of_gradients() -> None:
    plain, _ = bn.upgrade(small().double())
    found = []
    for model in (plain, bn.save_memory(copy.deepcopy(plain))[0]):
        x = X.double().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
        slope.square().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters())])
    assert equal(*found)


def _taken(seen: list[Tensor], module: nn.Module, given: Any, taken: Any) -> None:
    seen.append(taken[0].clone())


def _doubled(module: nn.Module, given: Any, output: Tensor) -> None:
    output.register_hook(lambda dy: dy * 2)


def test_hooks_of_tensors_and_modules() -> None:
    plain = small()
    found = []
    for model in (plain, bn.save_memory(copy.deepcopy(plain))[0]):
        seen: list[Tensor] = []
        model[1].register_full_backward_hook(partial(_taken, seen))
        model[2].register_forward_hook(_doubled)
        model[0].register_forward_hook(lambda module, given, output: output * 1.5)
        found.append(step(model) + seen)
    assert equal(*found)


def test_two_forward_passes_before_a_backward_pass() -> None:
    plain = small()
    found = []
    for model in (plain, bn.save_memory(copy.deepcopy(plain))[0]):
        (model(X).square().mean() + model(2 * X + 1).square().mean()).backward()
        found.append([p.grad for p in model.parameters()])
    assert equal(*found)


class _Raises(nn.Module):
    error: BaseException | None = None

    def forward(self, x: Any) -> Any:
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["ValueError", "Ctrl-C"])
def test_an_exception_in_between(error: BaseException) -> None:
    plain = small(_Raises())
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    saved[3].error = error
    with pytest.raises(type(error)):
        saved(X)
    saved[3].error = None
    assert isinstance(error, KeyboardInterrupt) or recipes.active() is None
    found = step(saved)  # the model may be run again, and then nothing is left
    assert recipes.active() is None
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    step(plain)
    assert equal(found[1:9], step(plain)[1:9])


def test_a_change_in_place_is_an_error_or_does_no_harm() -> None:
    class Net(nn.Module):
        which = ""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), bn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)

        def forward(self, x: Any) -> Any:
            a = self.first(x)
            b = self.norm(a)
            c = self.last(b)
            with torch.no_grad():
                {"": torch.zeros(1), "input of the layer": a, "output": b}[self.which].add_(1)
            return c

    torch.manual_seed(0)
    plain = Net()
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    reference = step(plain)
    Net.which = "output"
    found = step(saved)
    assert equal(reference, found)  # what is made again is what it was
    Net.which = "input of the layer"
    for model in (plain, saved):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            step(model)


@pytest.mark.parametrize("upgraded", [True, False])
def test_weights_that_change_before_the_backward_pass(upgraded: bool) -> None:
    """torch's error where it has one; the value of the forward pass where torch has that."""
    plain = bn.upgrade(small())[0] if upgraded else small()
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    found = []
    for model in (plain, saved):
        y = model(X).square().mean()
        with torch.no_grad():
            model[1].weight.mul_(2)
        found.append(list(torch.autograd.grad(y, [model[3].weight, model[3].bias], retain_graph=True)))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
    assert equal(*found)


def test_autocast() -> None:
    for upgraded in (False, True):
        plain = small(activation=nn.SiLU())
        plain = bn.upgrade(plain)[0] if upgraded else plain
        saved, _ = bn.save_memory(copy.deepcopy(plain))

        def call(model: nn.Module) -> list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                return step(model)

        assert equal(call(plain), call(saved))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing(reentrant: bool, inside: bool) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
            self.b = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3))

        def forward(self, x: Any) -> Any:
            x = self.a(x)
            return checkpoint(self.b, x, use_reentrant=reentrant) if inside else self.b(x)

    plain, _ = bn.upgrade(Outer())
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    x = X.clone().requires_grad_()

    def call(model: nn.Module) -> list[Tensor]:
        return step(model, x, model if inside else lambda x: checkpoint(model, x, use_reentrant=reentrant))

    assert equal(call(plain), call(saved))


def test_it_steps_aside_for_other_hooks() -> None:
    plain = small()
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    packed: Any = []
    with (
        saved_tensors_hooks(lambda tensor: [packed.append(tensor), tensor][1], lambda tensor: tensor),
        counted() as found,
    ):
        saved(X)
    assert packed
    assert found["kept"] == found["again"] == 0
    with save_on_cpu():
        found_there = step(bn.save_memory(copy.deepcopy(plain))[0])
    assert equal(step(plain), found_there)


def test_no_gradients_no_recording() -> None:
    saved, _ = bn.save_memory(small())
    with counted() as found, torch.no_grad():
        saved(X)
    with counted() as inferring, torch.inference_mode():
        saved(X)
    assert found["again"] == inferring["again"] == found["kept"] == inferring["kept"] == 0


def test_functional_transforms() -> None:
    saved, _ = bn.save_memory(bn.upgrade(small())[0].eval())
    parameters = dict(saved.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(saved, parameters, (X,))
        return output.square().mean()

    found = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in saved.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_threads() -> None:
    plain = small().eval()
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    reference = [
        list(torch.autograd.grad(plain(X + k).square().mean(), list(plain.parameters()))) for k in range(4)
    ]
    found: dict[int, list[Tensor]] = {}

    def work(k: int) -> None:
        for _ in range(5):
            found[k] = list(torch.autograd.grad(saved(X + k).square().mean(), list(saved.parameters())))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for k in range(4):
        for a, b in zip(reference[k], found[k], strict=True):
            torch.testing.assert_close(a, b)


def test_copies_and_pickles_save_too_and_states_are_equal() -> None:
    plain = small()
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    assert list(saved.state_dict()) == list(plain.state_dict())
    reference = spared_bytes(saved)
    assert reference < saved_bytes(plain)
    for again in (copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
        assert spared_bytes(again) == reference


def test_once_is_enough_and_downgrade_takes_it_back() -> None:
    plain, _ = bn.upgrade(small())
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    assert len(saved._forward_pre_hooks) == 1
    bn.save_memory(saved)
    assert len(saved._forward_pre_hooks) == len(saved._forward_hooks) == 1
    bn.downgrade(saved)
    assert not saved._forward_pre_hooks
    assert not saved._forward_hooks
    assert not saved._forward_hooks_always_called
    with counted() as found:
        saved(X)
    assert not found["kept"]


def test_a_child_called_by_itself_saves_too() -> None:
    """As timm's forward_features, and a LightningModule whose training_step calls its network."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = small(), nn.Flatten()

        def training_step(self, x: Any) -> Any:
            return self.head(self.net(x))

    saved, _ = bn.save_memory(Whole())
    with counted() as found:
        saved.training_step(X)
    assert found["again"] >= 2


def test_passes_take_a_saved_model() -> None:
    saved, _ = bn.save_memory(small())
    upgraded, report = bn.upgrade(copy.deepcopy(saved))
    assert report.count("fused") == 2
    assert spared_bytes(upgraded) < saved_bytes(small())
    folded, _ = bn.fold(copy.deepcopy(saved).eval(), X)
    torch.testing.assert_close(folded(X), saved.eval()(X), rtol=1e-4, atol=1e-5)
    assert not any(each._forward_pre_hooks for each in folded.modules())
    bn.population(saved, [X])
    torch.fx.symbolic_trace(saved)(X)
    torch.export.export(saved, (X,))
    assert bn.examine(saved.eval(), select=["BN1"]) is not None


def test_compiled_models_say_that_it_does_nothing() -> None:
    plain, _ = bn.upgrade(small())
    saved, _ = bn.save_memory(copy.deepcopy(plain))
    compiled = torch.compile(saved, backend="aot_eager", fullgraph=True)
    with pytest.warns(RuntimeWarning, match="does nothing in a compiled model"):
        found = step(saved, X, compiled)
    for a, b in zip(step(plain), found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    _, report = bn.save_memory(cast(nn.Module, torch.compile(small(), backend="aot_eager")))
    assert report.count("left alone") == 2
    assert "torch.compile decides" in str(report)
    inside = small()
    inside[0] = torch.compile(inside[0], backend="aot_eager")
    saved, _ = bn.save_memory(copy.deepcopy(inside))
    assert equal(step(inside), step(saved))


def test_the_report() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return input * 2

    model = nn.Sequential(
        bn.BatchNorm2d(3, activation="relu"), nn.BatchNorm2d(3), nn.SyncBatchNorm(3), Own(3),
        torchvision.ops.FrozenBatchNorm2d(3),
    )  # fmt: skip
    _, report = bn.save_memory(model)
    assert [each.outcome for each in report.layers] == ["recomputed"] * 2 + ["left alone"] * 3
    assert report["0"].what == "output, relu"
    assert "bn.upgrade" in report["1"].why
    assert "bn.convert_sync" in report["2"].why
    assert "Own" in report["3"].why


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, not str"):
        bn.save_memory("resnet18")  # type: ignore[type-var]


def test_pieces_of_a_concatenation_are_kept_once() -> None:
    """DenseNet's: what each layer reads is all that came before; kept are the pieces."""

    class Dense(nn.Module):
        def __init__(self, layers: int) -> None:
            super().__init__()
            self.norms = nn.ModuleList(bn.BatchNorm2d(3 + 4 * k, activation="relu") for k in range(layers))
            self.convs = nn.ModuleList(nn.Conv2d(3 + 4 * k, 4, 3, padding=1) for k in range(layers))

        def forward(self, x: Any) -> Any:
            found = [x]
            for norm, conv in zip(self.norms, self.convs, strict=True):
                found.append(conv(norm(torch.cat(found, 1))))
            return torch.cat(found, 1)

    torch.manual_seed(0)
    sizes = []
    for layers in (8, 16):
        plain = Dense(layers)
        saved, _ = bn.save_memory(copy.deepcopy(plain))
        assert equal(step(plain), step(saved))
        weights = sum(p.nbytes for p in saved.parameters())
        sizes.append(spared_bytes(saved) - weights)
    pixel = X[:, :1].nbytes
    assert sizes[0] < (3 + 4 * 8 + 1) * pixel + 40_000
    assert all(b < 2.2 * a for a, b in pairwise(sizes))


IN_PARALLEL = """
import copy, tempfile, warnings
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
import batchnorm as bn
from tests.passes.test_save_memory import X, counted, small
warnings.simplefilter("ignore")
dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
found = []
for saving in ("", "before", "after"):
    model = small(activation=nn.SiLU())
    model, _ = bn.upgrade(model) if {upgraded} else (model, None)
    if saving == "before":
        bn.save_memory(model)
    {wrap}
    if saving == "after":
        bn.save_memory(parallel)
    with counted() as kept:
        for _ in range(2):
            parallel(X).square().mean().backward()
            with torch.no_grad():
                for each in parallel.parameters():
                    each.sub_(0.05 * each.grad)
                    each.grad = None
    assert kept["again"] == (0 if not saving else kept["again"]) and (kept["again"] >= 4 or not saving), kept
    whole = lambda value: value.full_tensor() if hasattr(value, "full_tensor") else value
    found.append([whole(value) for value in model.state_dict().values()])
for each in found[1:]:
    assert all(map(torch.equal, found[0], each))
print("the same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("upgraded", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        "parallel = nn.parallel.DistributedDataParallel(model)",
        "fully_shard(model[3]); parallel = fully_shard(model)",
    ],
    ids=["DDP", "FSDP2"],
)
def test_wrapped_for_many_processes(wrap: str, upgraded: bool) -> None:
    assert said(IN_PARALLEL.format(wrap=wrap, upgraded=upgraded)).splitlines()[-1] == "the same"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning() -> None:
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def training_step(self, batch: Any, number: int) -> Any:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    found = []
    for saving in (False, True):
        task = Task()
        if saving:
            bn.save_memory(task)
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X.repeat(2, 1, 1, 1)), 4)
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "accelerator": "cpu",
        }
        with counted() as kept:
            lightning.Trainer(max_epochs=2, enable_model_summary=False, **quiet).fit(task, data)
        assert bool(kept["again"]) == saving
        found.append([*task.state_dict().values()])
    assert equal(*found)


OF_TIMM = "mobilenetv3_small_050 efficientnet_b0 resnet26d convmixer_768_32 dla34 res2net50_26w_4s"


@pytest.mark.parametrize("name", OF_TIMM.split())
def test_networks_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    if name == "convmixer_768_32":
        plain = timm.models.convmixer.ConvMixer(24, 6, patch_size=4, kernel_size=5)
    else:
        plain = timm.create_model(name, drop_rate=0.1)
    saved, report = bn.save_memory(copy.deepcopy(plain))
    assert report.count("recomputed") == len(report.layers)
    x = torch.randn(2, 3, 64, 64)
    assert equal(step(plain, x), step(saved, x))
    weights = sum(p.nbytes for p in plain.parameters())
    before, after = saved_bytes(copy.deepcopy(plain), x), spared_bytes(copy.deepcopy(saved), x)
    assert after - weights < 0.75 * (before - weights)
    assert equal(step(plain, x, plain.forward_features), step(saved, x, saved.forward_features))
