"""`virtual_batch`: micro-batches that are one batch, and whatever may go wrong on the way."""

import copy
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18

import batchnorm as bn
from tests.mutations.mutation import Mutation
from tests.passes.compare import tensors, unlike


def small(norm=bn.BatchNorm2d, **options):
    """Of float64, and for images of any size."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),  # whose gradient would be 0, and all of it rounding
        norm(4, **options),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, padding=1, bias=False),
        norm(5, **options),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 2),
    )
    return unlike(model).double()


def images(sizes=(3, 3, 3), side=6):
    return [(1 + k) * torch.randn(n, 3, side, side).double() + k for k, n in enumerate(sizes)]


def loss_of(output):
    """Of one sample it is not the same as of another."""
    return sum((k + 1) * each.sin().sum() for k, each in enumerate(tensors(output)))


def grads(model):
    return {name: each.grad for name, each in model.named_parameters()}


def near(found, expected, tolerance=1e-12):
    """Relative to the largest value of each."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value is not None and found[name] is not None, name
        off = (found[name] - value).abs().max() / value.abs().max()
        assert off <= tolerance, f"{name} is off by {off:.1e}"


def unpatched(*models):
    """Nothing is left of a virtual batch."""
    assert not any("forward" in vars(each) for model in models for each in model.modules())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("in lockstep")]


def whole(model, xs, loss=loss_of):
    """A copy of `model` that saw one batch, and its output."""
    one = copy.deepcopy(model)
    output = one(torch.cat(xs))
    loss(output).backward()
    return one, output


def same(two, one, tolerance=1e-12):
    near(grads(two), grads(one), tolerance)
    assert_close(dict(two.named_buffers()), dict(one.named_buffers()), rtol=tolerance, atol=tolerance)
    unpatched(two)


def looped(model, xs, **options):
    """The loop of gradient accumulation in the block, and all outputs."""
    outputs = []
    with bn.virtual_batch(model, xs, **options):
        for x in xs:
            outputs.append(model(x))
            loss_of(outputs[-1]).backward()
    return outputs


@pytest.fixture(scope="module")
def of_torch():
    """torch's resnet18 before and after a batch in float64, and the batch."""
    torch.manual_seed(0)
    model, x, labels = (
        resnet18(num_classes=10).double(),
        torch.randn(32, 3, 64, 64),
        torch.randint(0, 10, (32,)),
    )
    before = copy.deepcopy(model)
    return before, *after_one_batch(model, x.double(), labels), x, labels


def after_one_batch(model, x, labels):
    output = model(x)
    F.cross_entropy(output, labels).backward()
    return model, output.detach()


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "swapped"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_resnet18_in_eight_parts_is_resnet18(of_torch, dtype, tolerance, fuse):
    before, one, expected, x, labels = of_torch
    two, _ = bn.upgrade(copy.deepcopy(before).to(dtype), fuse=fuse)
    if dtype == torch.float32:  # torch's own rounding turns a ReLU here and there
        one, expected = after_one_batch(copy.deepcopy(two), x, labels)
    outputs, xs = [], x.to(dtype).split(4)
    with bn.virtual_batch(two, xs):
        for part, truth in zip(xs, labels.split(4), strict=True):
            outputs.append(two(part))
            (F.cross_entropy(outputs[-1], truth) / len(xs)).backward()
    near(grads(two), grads(one), tolerance)
    near({"y": torch.cat(outputs)}, {"y": expected}, tolerance)
    near(running(two), running(one), tolerance)
    assert two.bn1.num_batches_tracked == two.layer4[1].bn2.num_batches_tracked == 1
    unpatched(two)


def running(model):
    return {name: value for name, value in model.named_buffers() if "running" in name}


def test_accumulation_alone_is_something_else():
    model, xs = small(), images()
    one, _ = whole(model, xs)
    for x in xs:
        loss_of(model(x)).backward()
    off = [
        (a - b).abs().max() / b.abs().max()
        for a, b in zip(grads(model).values(), grads(one).values(), strict=True)
    ]
    assert max(off) > 0.1


@pytest.mark.parametrize("sizes", [(3, 3, 3), (1, 6, 2), (4,), (2, 0, 3), (1, 1)], ids=str)
def test_parts_of_any_number_of_samples(sizes):
    model, xs = small(), images(sizes)
    one, expected = whole(model, xs)
    outputs = looped(model, xs)
    same(model, one)
    assert [len(each) for each in outputs] == list(sizes)
    assert_close(torch.cat(outputs), expected)


def test_the_inputs_gradients_are_those_of_one_batch():
    model, xs = small(), [x.requires_grad_() for x in images((2, 3))]
    together = torch.cat(xs).detach().requires_grad_()
    loss_of(copy.deepcopy(model)(together)).backward()
    looped(model, xs)
    assert_close(torch.cat([x.grad for x in xs]), together.grad)


def over_all(model, xs):
    """`small` in torch's operations for a list of images: moments over all positions of all of them."""
    for layer in model:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            values = torch.cat([x.movedim(1, 0).flatten(1) for x in xs], 1)
            var, mean = torch.var_mean(values, 1, correction=0)
            scale = layer.weight / (var + layer.eps).sqrt()
            mean_, scale_, bias = (each.reshape(-1, 1, 1) for each in (mean, scale, layer.bias))
            xs = [(x - mean_) * scale_ + bias for x in xs]
        else:
            xs = [layer(x) for x in xs]
    return xs, mean, values.var(1)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_images_of_different_sizes_are_one_batch(activation):
    model = small()
    if activation:
        model[1].activation, model[2] = activation, nn.Identity()
    xs = [torch.randn(n, 3, h, w).double() + 3 * n for n, h, w in ((2, 6, 5), (1, 3, 9), (3, 6, 5))]
    oracle = small()
    oracle.load_state_dict(model.state_dict())
    expected, mean, var = over_all(oracle, xs)
    sum(map(loss_of, expected)).backward()
    old = copy.deepcopy(model[4])
    outputs = looped(model, xs)
    near(grads(model), grads(oracle))
    assert_close(outputs, expected)
    assert_close(model[4].running_mean, 0.9 * old.running_mean + 0.1 * mean)
    assert_close(model[4].running_var, 0.9 * old.running_var + 0.1 * var)
    assert model[4].num_batches_tracked == 1
    unpatched(model)


def test_masks_of_different_sizes():
    layer = bn.BatchNorm1d(3, dtype=torch.float64)
    xs = [torch.randn(n, 3, length).double() for n, length in ((2, 5), (3, 4))]
    lengths = [torch.tensor([5, 2]), torch.tensor([1, 4, 0])]
    padded = torch.cat([F.pad(x, (0, 5 - x.size(2)), value=9.0) for x in xs])
    one = copy.deepcopy(layer)
    expected = one(padded, mask=torch.cat(lengths))
    given = [{"input": x, "mask": each} for x, each in zip(xs, lengths, strict=True)]
    with bn.virtual_batch(layer, given) as outputs:
        loss_of(outputs).backward()
    assert_close(outputs[0], expected[:2])
    assert_close(outputs[1], expected[2:, :, :4])
    assert_close(layer.state_dict(), one.state_dict())


def test_a_part_without_a_mask_is_all_valid():
    layer = bn.BatchNorm1d(3, dtype=torch.float64)
    one = copy.deepcopy(layer)
    xs, mask = (
        [torch.randn(n, 3, 5).double() for n in (1, 3)],
        torch.tensor([[[True, True, False, True, False]]]),
    )
    expected = one(torch.cat(xs), mask=torch.cat([mask, torch.ones(3, 1, 5, dtype=torch.bool)]))
    with bn.virtual_batch(layer, [{"input": xs[0], "mask": mask}, {"input": xs[1]}]) as outputs:
        pass
    assert_close(torch.cat(outputs), expected)
    assert_close(layer.state_dict(), one.state_dict())


@pytest.mark.parametrize(
    ("layer", "shapes", "said"),
    [
        (lambda: bn.BatchNorm1d(3, statistics=bn.Ghost(2)), [(2, 3, 4), (2, 3, 5)], "Ghost"),
        (
            lambda: bn.BatchNorm2d((3, 4, 4)),
            [(2, 3, 4, 4), (2, 3, 4, 5)],
            "each activation has its own statistics",
        ),
        (lambda: bn.BatchNorm1d(3), [(2, 3, 4), (2, 3, 4, 5)], "expected 2D or 3D input"),
        (lambda: bn.BatchNorm1d(3), [(2, 3, 4), (2, 4, 4)], "Sizes of tensors"),
    ],
    ids=["ghost", "per activation", "rank", "channels"],
)
def test_parts_that_cannot_be_joined(layer, shapes, said):
    model = layer()
    before = copy.deepcopy(model.state_dict())
    with (
        pytest.raises((ValueError, RuntimeError), match=said),
        bn.virtual_batch(model, [torch.randn(s) for s in shapes]),
    ):
        pytest.fail("was entered")
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    unpatched(model)


def test_the_outputs_may_be_used_at_once():
    model, xs = small(), images()
    one, expected = whole(model, xs, lambda y: (y.var(0) + y.mean(0)).sum())  # a loss that needs all of them
    with bn.virtual_batch(model, xs) as outputs:
        assert_close(torch.cat(outputs), expected)
        together = torch.cat(outputs)
        (together.var(0) + together.mean(0)).sum().backward()
        assert model[0].weight.grad is None
    same(model, one)


def test_what_is_learned_outside_the_model_gets_its_gradient_in_the_block():
    model, head, xs = small(), nn.Linear(2, 3).double(), images()
    one, one_head = copy.deepcopy(model), copy.deepcopy(head)
    loss_of(one_head(one(torch.cat(xs)))).backward()
    with bn.virtual_batch(model, xs):
        for x in xs:
            loss_of(head(model(x))).backward()
        near(grads(head), grads(one_head))
    near(grads(head), grads(one_head))
    same(model, one)


def test_the_model_may_be_asked_again():
    model, xs = small(), images()
    one, _ = whole(model, xs, lambda y: loss_of(y) + y.square().sum())
    with bn.virtual_batch(model, xs):
        for x in xs:
            loss_of(model(x)).backward()
        for x in xs:
            model(x.clone()).square().sum().backward()  # equal will do
    same(model, one)


def test_a_loss_may_leave_outputs_out():
    model, xs = small(), images()
    one, _ = whole(model, xs, lambda y: loss_of(y[3:6]))
    with bn.virtual_batch(model, xs):
        loss_of(model(xs[1])).backward()
    same(model, one)


def test_steps_of_an_optimiser_are_those_of_whole_batches():
    two = small()
    one = copy.deepcopy(two)
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (one, two)]
    for _ in range(3):
        xs = images((2, 3))
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss_of(one(torch.cat(xs))).backward()
        looped(two, xs)
        for optimiser in optimisers:
            optimiser.step()
    assert_close(two.state_dict(), one.state_dict(), rtol=1e-9, atol=1e-9)
    assert two[1].num_batches_tracked == 3


def test_two_virtual_batches_add_up():
    two, first, second = small(), images((2, 3)), images((4, 1))
    one = copy.deepcopy(two)
    for xs in (first, second):
        loss_of(one(torch.cat(xs))).backward()
        looped(two, xs)
    same(two, one)


@pytest.mark.parametrize(
    "options",
    [
        {"statistics": bn.Ghost(2)},  # a group is of two parts
        {"statistics": bn.Renorm()},
        {"statistics": bn.Population()},
        {"momentum": None},
        {"momentum": 0.3, "debiased": True},
        {"activation": "silu"},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_layers_of_every_setting(options):
    model, xs = small(**options), images((3, 2, 1, 4))
    one, expected = whole(model, xs)
    assert_close(torch.cat(looped(model, xs)), expected)
    same(model, one)


class Residual(nn.Module):
    """One layer, called twice, with a residual and a mask; of several outputs."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv1d(3, 3, 1, bias=False).double()
        self.norm = unlike(bn.BatchNorm1d(3, activation="relu", dtype=torch.float64))
        self.each = unlike(bn.BatchNorm1d((3, 4), dtype=torch.float64))

    def forward(self, x, *, mask):
        y = self.norm(self.inner(x), residual=x, mask=mask)
        y = self.norm(self.inner(y), x, mask)
        return {"a": (y, None), "b": [self.each(y)], "size": x.size(0)}


def test_residuals_masks_layers_called_twice_and_outputs_of_any_form():
    model, sizes = Residual(), (3, 1, 2)
    xs = [torch.randn(n, 3, 4).double() for n in sizes]
    masks = [torch.rand(n, 1, 4) < 0.7 for n in sizes]
    one = copy.deepcopy(model)
    expected = one(torch.cat(xs), mask=torch.cat(masks))
    loss_of([*expected["a"][:1], *expected["b"]]).backward()
    batches = [{"x": x, "mask": mask} for x, mask in zip(xs, masks, strict=True)]
    with bn.virtual_batch(model, batches):
        outputs = [model(**each) for each in batches]
        for each in outputs:
            loss_of([*each["a"][:1], *each["b"]]).backward()
    same(model, one)
    assert [each["size"] for each in outputs] == list(sizes) and outputs[0]["a"][1] is None
    assert_close(torch.cat([each["b"][0] for each in outputs]), expected["b"][0])
    assert model.norm.num_batches_tracked == 2


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "generator", "forward"])
def test_batches_of_every_form(form):
    model, xs = small(), images()
    one, _ = whole(model, xs)
    given: Any = {
        "tuple": [(x, "label") for x in xs],
        "list": [[x] for x in xs],
        "dict": [{"input": x} for x in xs],
        "generator": (x for x in xs),
        "forward": [("label", x) for x in xs],
    }[form]
    forward = (lambda network, batch: network(batch[1])) if form == "forward" else None
    with bn.virtual_batch(model, given, forward=forward):
        for x in xs:
            loss_of(model(input=x) if form == "dict" else model(x)).backward()
    same(model, one)


def test_without_gradients():
    model, xs = small(), images()
    one = copy.deepcopy(model)
    with torch.no_grad():
        expected = one(torch.cat(xs))
        with bn.virtual_batch(model, xs) as outputs:
            assert not any(each.requires_grad for each in outputs)
            assert_close(torch.cat(outputs), expected)
    assert_close(model.state_dict(), one.state_dict())
    unpatched(model)


def test_a_mode_of_ones_own_reaches_the_threads():
    model, xs = small().float(), [x.float() for x in images()]
    one = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = one(torch.cat(xs))
        with bn.virtual_batch(model, xs):
            outputs = [model(x) for x in xs]
            for each in outputs:
                loss_of(each.float()).backward()
    loss_of(expected.float()).backward()
    assert outputs[0].dtype == torch.bfloat16
    assert_close(torch.cat(outputs), expected)
    near(grads(model), grads(one), 0.03)
    assert_close(model[1].running_mean, one[1].running_mean)


def test_in_evaluation_a_part_is_a_batch():
    model, xs = small(nn.BatchNorm2d).eval(), images()  # torch's layers as well
    one, expected = whole(model, xs)
    assert_close(torch.cat(looped(model, xs)), expected)
    same(model, one)


def test_it_works_in_a_domain():
    model, xs = small(), images()
    one = copy.deepcopy(model)
    with bn.domain("a"):
        one(torch.cat(xs))
        looped(model, xs)
    assert_close(model.state_dict(), one.state_dict())
    assert model[1].domains["a"].num_batches_tracked == 1


def test_the_same_seed_drops_the_same():
    model = nn.Sequential(nn.Dropout(), bn.BatchNorm2d(3), nn.Dropout()).double()
    xs, found = images(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(torch.cat(looped(model, xs)))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    dropped = [each == 0 for each in found[0].split(3)]
    assert not torch.equal(dropped[0], dropped[1])


def test_what_comes_next_may_work_in_place():
    model, xs = small(), images()
    model[2] = nn.ReLU(inplace=True)
    one, _ = whole(model, xs)
    looped(model, xs)
    same(model, one)


def test_memory_may_be_that_of_the_cpu():
    model, xs = small(), images()
    one, expected = whole(model, xs)
    assert_close(torch.cat(looped(model, xs, offload=True)), expected)
    same(model, one)


def test_hooks_of_the_users_work():
    model, xs, seen = small(), images(), []
    model.register_forward_hook(lambda _, __, output: 2 * output)
    model[1].register_forward_hook(lambda _, arguments, __: seen.append(len(arguments[0])))
    one, _ = whole(model, xs)
    seen.clear()
    looped(model, xs)
    assert seen == [3, 3, 3]
    same(model, one)


def test_a_forward_of_ones_own_stays():
    model, xs = small(), images()
    own = model.forward
    model.forward = lambda x: own(2 * x)
    before = model.forward
    one, _ = whole(small(), [2 * x for x in xs])
    one.load_state_dict(model.state_dict())
    one.zero_grad()
    loss_of(one(2 * torch.cat(xs))).backward()
    looped(model, xs)
    near(grads(model), grads(one))
    assert vars(model)["forward"] is before


def test_the_model_may_be_a_layer():
    layer, xs = bn.BatchNorm2d(3, dtype=torch.float64), images()
    one, expected = whole(layer, xs)
    assert_close(torch.cat(looped(layer, xs)), expected)
    same(layer, one)


@pytest.mark.parametrize("given", [[], iter([])], ids=["list", "iterator"])
def test_none_is_an_error(given):
    model = small()
    with pytest.raises(ValueError, match="at least one"), bn.virtual_batch(model, given):
        pass
    unpatched(model)


def test_layers_of_torchs_are_an_error():
    model = nn.Sequential(bn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.SyncBatchNorm(3))
    with pytest.raises(ValueError, match=r"^1, 2: .*bn\.upgrade"), bn.virtual_batch(model, images()):
        pass
    unpatched(model)


def test_another_input_in_the_block_is_an_error():
    model, xs = small(), images()
    for other in (xs[0] + 1, xs[0][:2], xs[0].float(), xs[0][None]):
        with pytest.raises(RuntimeError, match="none of them"), bn.virtual_batch(model, xs):
            model(other)
        unpatched(model)
    assert all(each.grad is None for each in model.parameters())


def test_a_forward_that_calls_a_part_of_the_model_is_an_error():
    model, xs = small(), images()
    with (
        pytest.raises(RuntimeError, match="`forward` did not call the model"),
        bn.virtual_batch(model, xs, forward=lambda network, x: network.get_submodule("0")(x)),
    ):
        pytest.fail("was entered")
    unpatched(model)


class Fork(nn.Module):
    """Goes where the data tell it."""

    def __init__(self, order):
        super().__init__()
        self.a, self.b, self.order = bn.BatchNorm1d(3), bn.BatchNorm1d(3), order

    def forward(self, x):
        for name in self.order[int(x[0, 0])]:
            x = getattr(self, name)(x)
        return x


@pytest.mark.parametrize(
    "ways", [("a", "b"), ("a", ""), ("", "a"), ("aa", "a"), ("a", "aa"), ("ab", "ba")], ids=str
)
@pytest.mark.parametrize("chosen", [(0, 1), (0, 0, 1), (0, 1, 0), (1, 0, 0)], ids=str)
def test_parts_that_go_different_ways_are_an_error(ways, chosen):
    model = Fork(ways)
    xs = [
        torch.randn(4, 3).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(float(k)))
        for k in chosen
    ]
    with pytest.raises(RuntimeError, match="different paths"), bn.virtual_batch(model, xs):
        pass
    unpatched(model)


class Failing(Exception):
    pass


class Fails(nn.Module):
    """With those samples whose first value says so."""

    def forward(self, x):
        if bool(x[0, 0, 0, 0] == 7):
            self.breaks()
        return x

    def breaks(self):
        raise Failing("in a layer")


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("place", [0, 2, 5], ids=["first", "between", "last"])
def test_an_exception_in_a_layer_is_raised_and_nothing_is_left(part, place):
    model, xs = small(), images((2, 2, 2))
    body = list(model)
    if place == 5:  # outputs that are pooled have no image left
        body = body[:5]
    model = nn.Sequential(*body[:place], Fails(), *body[place:])

    def seven(_, arguments):
        calls.append(1)
        if len(calls) == part + 1:
            arguments[0].data[0, 0, 0, 0] = 7

    calls: list[int] = []
    model[place].register_forward_pre_hook(seven)
    with pytest.raises(Failing, match="in a layer") as raised, bn.virtual_batch(model, xs):
        pytest.fail("was entered")
    names = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert names[-1] == "breaks" and names[0] == "test_an_exception_in_a_layer_is_raised_and_nothing_is_left"
    unpatched(model)


def test_an_exception_in_normalization_names_the_layer():
    model = small()
    with (
        pytest.raises(ValueError, match="more than 1 value") as raised,
        bn.virtual_batch(model, [torch.randn(1, 3, 1, 1).double()]),
    ):
        pass
    assert "in layer '1'" in raised.value.__notes__[0]
    unpatched(model)


@pytest.mark.parametrize("error", [Failing, KeyboardInterrupt, SystemExit])
def test_an_exception_in_the_block_takes_no_gradients(error):
    model, xs = small(), images()

    def step():
        with bn.virtual_batch(model, xs):
            loss_of(model(xs[0])).backward()
            raise error

    with pytest.raises(error):
        step()
    assert all(each.grad is None for each in model.parameters())
    unpatched(model)
    model(xs[0])
    assert model[1].num_batches_tracked == 2


def test_leaving_by_break_or_return_takes_gradients():
    model, xs = small(), images()
    one, _ = whole(model, xs)

    def step():
        with bn.virtual_batch(model, xs) as outputs:
            loss_of(torch.cat(outputs)).backward()
            return

    step()
    same(model, one)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing_is_refused(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body = nn.Conv2d(3, 3, 1, bias=False).double(), small()

        def forward(self, x):
            return checkpoint(self.body, self.first(x), use_reentrant=reentrant)

    model, xs = Checkpointed(), images()
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        looped(model, xs)
    unpatched(model)


def test_checkpointing_what_has_no_layers_is_fine():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small()

        def forward(self, x):
            return checkpoint(self.body[5:], self.body[:5](x), use_reentrant=False)

    model, xs = Checkpointed(), images()
    one, _ = whole(model, xs)
    looped(model, xs)
    same(model, one)


@pytest.mark.slow
def test_no_graph_is_left_behind():
    model, xs = small(), images()
    looped(model, xs)
    before = alive()
    for _ in range(3):
        looped(model, xs)
    assert alive() <= before


def alive():
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


INTERRUPTED = """
    import signal, threading, time
    import torch, batchnorm as bn
    from torch import nn

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore

    class Slow(nn.Module):
        def forward(self, x):
            print("slow", flush=True)
            time.sleep(0.2)
            return x

    model = nn.Sequential(*[layer for _ in range(100) for layer in (Slow(), bn.BatchNorm1d(3))])
    try:
        with bn.virtual_batch(model, [torch.randn(4, 3) for _ in range(3)]):
            pass
    except KeyboardInterrupt:
        pass
    assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
    assert not any("forward" in vars(each) for each in model.modules())
    print("ended", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_an_interrupt_ends_it():
    script = [sys.executable, "-c", textwrap.dedent(INTERRUPTED)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "slow\n"
        child.send_signal(signal.SIGINT)
        try:
            out, err = child.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            child.kill()
            raise
    assert child.returncode == 0, err
    assert out.endswith("ended\n")


def test_equal_micro_batches_are_answered_one_after_the_other():
    # one input twice, for dropout to see it in two ways
    model = nn.Sequential(nn.Linear(3, 64), bn.BatchNorm1d(64), nn.Dropout(0.5))
    x = torch.randn(6, 3)
    for inputs in ([x, x], [x, x.clone()]):
        with bn.virtual_batch(model, inputs) as outputs:
            first, second, again = (model(each) for each in (*inputs, inputs[0]))
        assert first is outputs[0]
        assert second is outputs[1]
        assert any(again is output for output in outputs)
        assert not torch.equal(first, second)


def test_a_residual_of_another_shape_is_refused_where_sizes_differ():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(x, x.transpose(2, 3).contiguous())

    micro = [torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 6)]
    with pytest.raises(ValueError, match="residual has shape"), bn.virtual_batch(Turned(), micro):
        pass


MUTATIONS = [
    Mutation(
        "parts of one tensor", "passes/virtual_batch/together.py",
        "tuple(part.clone() for part in output.split(", "tuple(part for part in output.split(",
        "what comes next may work in place",
    ),
    Mutation(
        "checkpointing let into a virtual batch", "passes/virtual_batch/micro_batches.py",
        "            patches.enter_context(_patch_forward(layer, _raise_on_recomputation))", "            pass",
        "what is recomputed would be normalised by one part",
    ),
    Mutation(
        "threads without autocast", "passes/virtual_batch/micro_batches.py",
        "if torch.is_autocast_enabled(device)", "if False",
        "modes are a thread's own",
    ),
    Mutation(
        "a part that left early", "passes/virtual_batch/lockstep.py",
        "            if any(self._arrivals):\n", "            if False:\n",
        "the others wait at a layer for nothing",
    ),
]  # fmt: skip
