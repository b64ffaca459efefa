"""What ranks do together in the tests of Sync, each a process that runs `main`.

A task fails on a rank; all ranks' tasks are the same and most compare with what one process makes of all the data.
"""

import copy
import faulthandler
import io
import itertools
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
import batchnorm.statistics.process_group as exchange_of
from batchnorm.kernels import stepwise
from batchnorm.kernels.choice import NAMES, Name

BATCHES = {2: (5, 3), 4: (7, 1, 0, 24)}  # samples on each rank
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
PATIENCE = 4  # seconds that ranks wait for one that hangs

Task = Callable[[], None]
TASKS: dict[int, dict[str, Task]] = {2: {}, 3: {}, 4: {}}


def on(*ranks: int) -> Callable[[Task], Task]:
    """So many ranks run this task."""

    def add(task: Task) -> Task:
        for each in ranks:
            TASKS[each][task.__name__] = task
        return task

    return add


def mine(whole: Tensor) -> Tensor:
    """The samples of this rank."""
    parts: tuple[Tensor, ...] = whole.split(BATCHES[dist.get_world_size()])
    return parts[dist.get_rank()]


def summed(own: Tensor | None) -> Tensor:
    assert own is not None
    total = own.detach().double().clone()
    dist.all_reduce(total)
    return total


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest value there is."""
    assert found.shape == expected.shape
    if found.numel():
        distance = (found.detach().double() - expected).abs().max().item()
        scale = max(1.0, expected.abs().max().item())
        assert distance <= tolerance * scale, f"off by {distance:.1e} at a scale of {scale:.1e}"


@contextmanager
def exchanges(expected: list[str]) -> Iterator[None]:
    """What this process exchanges with others in the block."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        yield
    events = sorted(seen.events() or [], key=lambda event: event.time_range.start)
    assert [event.name for event in events if event.name.startswith("gloo:")] == expected


@contextmanager
def unknown(_: list[str]) -> Iterator[None]:
    """Of the first steps, in which ranks do not know yet what follows what, and exchange a number first."""
    yield


FORWARD, BACKWARD = ["gloo:all_gather"], ["gloo:all_reduce"]


@dataclass
class Problem:
    """A batch of all ranks, and what is to be done with it."""

    x: Tensor
    dy: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None = None
    mask: Tensor | None = None  # (N, 1, *S)
    relu: bool = False
    about: float = 0

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        form: str = "",
        about: float = 0,
        mask: Tensor | None = None,
        memory: torch.memory_format = torch.contiguous_format,
    ) -> "Problem":
        shape = (sum(BATCHES[dist.get_world_size()]), *shape)
        torch.manual_seed(0)
        x, dy, residual = (torch.randn(shape, dtype=dtype).to(memory_format=memory) for _ in range(3))
        weight, bias = torch.rand(shape[1], dtype=dtype) + 0.5, torch.randn(shape[1], dtype=dtype)
        plain = "plain" in form
        return cls(
            x * 2 + about + 1,
            dy,
            None if plain else weight,
            None if plain else bias,
            residual if "residual" in form else None,
            mask,
            "relu" in form,
            about,
        )

    def oracle(self) -> dict[str, Tensor]:
        """torch's batch_norm in float64, of the rows that count; it has to be spared a large mean."""
        x, weight, bias, residual = (
            None if value is None else value.detach().double().requires_grad_()
            for value in (self.x, self.weight, self.bias, self.residual)
        )
        assert x is not None
        channels = x.size(1)
        counted = torch.ones_like(x[:, 0], dtype=torch.bool) if self.mask is None else self.mask[:, 0]
        mean, var = torch.zeros(channels).double() - self.about, torch.ones(channels).double()
        rows = x.movedim(1, -1)[counted] - self.about
        y = F.batch_norm(rows, mean, var, weight, bias, True, 0.1, 1e-5)
        if residual is not None:
            y = y + residual.movedim(1, -1)[counted]
        if self.relu:
            y = y.relu()
        y.backward(self.dy.double().movedim(1, -1)[counted])
        whole = torch.zeros_like(x).detach()
        whole.movedim(1, -1)[counted] = y.detach()
        values = {"y": whole, "mean": mean + self.about, "var": var}
        for name, leaf in {"x": x, "weight": weight, "bias": bias, "residual": residual}.items():
            if leaf is not None and leaf.grad is not None:
                values[f"d{name}"] = leaf.grad
        return values

    def layer(self) -> bn.BatchNorm:
        layer = bn.BatchNorm(
            self.x.size(1),
            affine=self.weight is not None,
            activation="relu" if self.relu else None,
            statistics=bn.Sync(),
            dtype=self.x.dtype,
        )
        if self.weight is not None and self.bias is not None:
            layer.load_state_dict({"weight": self.weight, "bias": self.bias}, strict=False)
        return layer

    def check(self, kernels: Name) -> None:
        # of a mean, float64 holds so many digits
        tolerance = max(TOLERANCE[self.x.dtype], 4 * self.about * torch.finfo(torch.float64).eps)
        layer, expected = self.layer(), self.oracle()
        x = mine(self.x).clone(memory_format=torch.preserve_format).requires_grad_()
        residual = None if self.residual is None else mine(self.residual).clone().requires_grad_()
        with bn.kernels.use(kernels):
            y = layer(x, residual, None if self.mask is None else mine(self.mask))
            y.backward(mine(self.dy))
        near(y, mine(expected["y"]), tolerance)
        assert x.grad is not None
        near(x.grad, mine(expected["dx"]), tolerance)
        if residual is not None:
            assert residual.grad is not None
            near(residual.grad, mine(expected["dresidual"]), tolerance)
        if self.weight is not None:
            near(summed(layer.weight.grad), expected["dweight"], tolerance)
            near(summed(layer.bias.grad), expected["dbias"], tolerance)
        assert layer.running_mean is not None and layer.running_var is not None
        near(layer.running_mean, expected["mean"], tolerance)
        near(layer.running_var, expected["var"], tolerance)
        assert layer.num_batches_tracked == 1 and layer.num_batches_skipped == 0


@on(2, 4)
def unequal_batches_are_one():
    shapes = [(5,), (5, 6), (5, 3, 4), (5, 2, 3, 2)]
    forms = ["", "plain", "relu", "residual", "residual relu"]
    for shape, form, dtype, kernels in itertools.product(shapes, forms, TOLERANCE, NAMES):
        Problem.of(shape, dtype, form).check(kernels)
    for form, dtype, kernels in itertools.product(forms, TOLERANCE, NAMES):
        Problem.of((5, 3, 4), dtype, form, memory=torch.channels_last).check(kernels)


@on(2, 4)
def a_large_mean_costs_no_digits():
    for shape, dtype, kernels in itertools.product([(5,), (5, 6, 4)], TOLERANCE, NAMES):
        Problem.of(shape, dtype, "residual relu", about=1e4).check(kernels)


@on(2, 4)
def masks_count_what_is_valid_on_every_rank():
    """The last rank has padding alone, whatever is in it."""
    samples = sum(BATCHES[dist.get_world_size()])
    for dtype, kernels, form in itertools.product(TOLERANCE, NAMES, ["plain", "residual relu"]):
        mask = torch.rand(samples, 1, 6, generator=torch.Generator().manual_seed(1)) > 0.3
        mask[-BATCHES[dist.get_world_size()][-1] :] = False
        problem = Problem.of((5, 6), dtype, form, mask=mask)
        problem.x = torch.where(mask, problem.x, torch.nan)
        oracle = problem.oracle()
        oracle["dx"] = torch.where(mask, oracle["dx"], 0)
        with mock.patch.object(problem, "oracle", lambda oracle=oracle: oracle):
            problem.check(kernels)


@on(2, 4)
def every_activation_may_have_a_mask():
    """Counts of each channel; a rank's may hold no samples at all."""
    samples = sum(BATCHES[dist.get_world_size()])
    torch.manual_seed(0)
    x = torch.randn(samples, 3, 4, dtype=torch.float64)
    lengths = torch.randint(0, 5, (samples,))
    alone = bn.BatchNorm1d((3, 4), dtype=torch.float64)
    expected = alone(x, mask=lengths)
    for kernels in NAMES:
        layer = bn.BatchNorm1d((3, 4), dtype=torch.float64, statistics=bn.Sync())
        with bn.kernels.use(kernels):
            near(layer(mine(x), mask=mine(lengths)), mine(expected), 1e-12)
        assert layer.running_var is not None and alone.running_var is not None
        near(layer.running_var, alone.running_var, 1e-12)


@on(2)
def a_layer_costs_one_exchange_forward_and_one_backward():
    for kernels, batch in itertools.product(NAMES, [(3, 4), (0, 4)]):
        first, second = (bn.BatchNorm1d(4, activation="relu", statistics=bn.Sync()) for _ in range(2))
        with bn.kernels.use(kernels):
            for expect in (unknown, unknown, exchanges):
                for layer in (first, second):
                    layer.train()
                x = torch.randn(batch if dist.get_rank() else (3, 4), requires_grad=True)
                with expect(FORWARD * 2):
                    y = second(first(x), x)
                with expect(BACKWARD * 2):
                    y.sum().backward()
                with expect(FORWARD), torch.no_grad():
                    first(x)
                with expect(FORWARD * 2):
                    y = second(first(x.detach()))
                with expect(BACKWARD):  # nobody asks for the gradient of the data
                    y.sum().backward()
                with exchanges([]):
                    second.eval()(first.eval()(x)).sum().backward()
                with exchanges([]):
                    bn.freeze(copy.deepcopy(first).train())[0](x).sum().backward()


@on(4)
def groups_keep_to_themselves():
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    alone = [dist.new_group([rank]) for rank in range(4)]
    rank = dist.get_rank()
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, dtype=torch.float64)  # a batch for each pair, of 5 and 3
    pair, place = rank // 2, rank % 2
    both = x[pair].clone().requires_grad_()
    own = x[pair].split([5, 3])[place].clone().requires_grad_()
    for kernels in NAMES:
        one = bn.BatchNorm1d(5, dtype=torch.float64)
        two = bn.BatchNorm1d(5, dtype=torch.float64, statistics=bn.Sync(pairs[pair]))
        with bn.kernels.use(kernels):
            y, expected = two(own), one(both)
            (dx,) = torch.autograd.grad(y.pow(3).sum(), own)
            (dboth,) = torch.autograd.grad(expected.pow(3).sum(), both)
        near(y, expected.split([5, 3])[place], 1e-12)
        near(dx, dboth.split([5, 3])[place], 1e-12)
        assert one.running_var is not None and two.running_var is not None
        near(two.running_var, one.running_var, 1e-12)
    with exchanges([]):
        costs_nothing(bn.Sync(alone[rank]))
    layer = bn.BatchNorm1d(5, dtype=torch.float64, statistics=bn.Sync(pairs[1 - pair]))
    with pytest.raises(RuntimeError, match=f"rank {rank} is not one of .*process group"):
        layer(own)


def costs_nothing(sync: bn.Sync) -> None:
    """The same call as without, and the same bits."""
    torch.manual_seed(0)
    x, dy = torch.randn(6, 5, 4).requires_grad_(), torch.randn(6, 5, 4)
    found = []
    with mock.patch.object(stepwise, "forward", side_effect=AssertionError("in steps")):
        for statistics in (None, sync):
            layer = bn.BatchNorm1d(5, activation="relu", statistics=statistics)
            y = layer(x)
            found.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], dy), *layer.buffers()])
    assert all(map(torch.equal, *found))


def network(**options: bool) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        bn.BatchNorm2d(6, activation="relu", **options),  # type: ignore[arg-type]
        nn.Conv2d(6, 4, 3, bias=False),
        bn.BatchNorm2d(4, **options),  # type: ignore[arg-type]
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 3),
    )


def same_state(found: nn.Module, expected: nn.Module, tolerance: float) -> None:
    mine, theirs = found.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        near(values, theirs[name].double(), tolerance)


@on(2)
def training_in_parallel_is_training_on_the_whole_batch():
    one, two = network(), DistributedDataParallel(bn.convert_sync(network())[0])
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (one, two)]
    rank = dist.get_rank()
    for _ in range(3):
        x, target = torch.randn(8, 3, 8, 8), torch.randint(0, 3, (8,))
        halves = slice(4 * rank, 4 * rank + 4)
        for model, batch, labels in ((one, x, target), (two, x[halves], target[halves])):
            F.cross_entropy(model(batch), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    same_state(two.module, one, 1e-6)
    assert one[1].num_batches_tracked == 3  # and so has the other, of the same state


@on(2)
def two_forwards_before_a_backward():
    """A discriminator's: DDP broadcasts the buffers before the second, which the first has used."""
    one, two = network().double(), DistributedDataParallel(bn.convert_sync(network().double())[0])
    torch.manual_seed(0)
    real, fake = torch.randn(2, 8, 3, 8, 8, dtype=torch.float64)
    halves = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    for model, a, b in ((one, real, fake), (two, real[halves], fake[halves])):
        (model(a).pow(2).mean() - model(b).mean()).backward()
    same_state(two.module, one, 1e-12)
    for mine, whole in zip(two.module.parameters(), one.parameters(), strict=True):
        assert mine.grad is not None and whole.grad is not None
        near(mine.grad, whole.grad, 1e-12)


@on(2)
def a_checkpoint_exchanges_again_and_counts_once():
    kept, *others = (bn.convert_sync(network().double())[0] for _ in range(4))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    kept(x).pow(2).sum().backward()
    for recomputed, expect in zip(others, (unknown, unknown, exchanges), strict=True):
        body, head = recomputed[:4], recomputed[4:]
        with expect(FORWARD * 2):
            y = head(checkpoint(body, x, use_reentrant=False))
        with expect(FORWARD * 2 + BACKWARD * 2):
            y.pow(2).sum().backward()
        same_state(recomputed, kept, 1e-14)
        for a, b in zip(recomputed.parameters(), kept.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            near(a.grad, b.grad, 1e-14)


@on(2)
def compiled_as_one_graph_it_is_the_same():
    torch.manual_seed(0)
    whole = torch.randn(8, 5, 6, requires_grad=True)
    eager = bn.BatchNorm1d(5, activation="relu", statistics=bn.Sync())
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = []
    for model in (compiled, eager):
        x = mine(whole).detach().requires_grad_()
        y = model(x)
        y.pow(3).sum().backward()
        assert x.grad is not None
        found.append((y, x.grad))
    for a, b in zip(*found, strict=True):
        near(a, b, 1e-6)
    same_state(layer, eager, 1e-6)
    near(summed(layer.weight.grad), summed(eager.weight.grad), 1e-6)
    alone = bn.BatchNorm1d(5, activation="relu")
    near(found[0][0], mine(alone(whole)).double(), 1e-6)
    same_state(layer, alone, 1e-6)
    layer.eval()
    with exchanges([]):
        y = compiled(x)
        y.sum().backward()
    near(y, mine(alone.eval()(whole)).double(), 1e-6)


@on(2)
def one_value_of_all_ranks_is_one_value():
    x = torch.randn(1 - dist.get_rank(), 3)
    layer = bn.BatchNorm1d(3, statistics=bn.Sync())
    before = copy.deepcopy(layer.state_dict())
    with exchanges(FORWARD * 2), pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x)  # one more than later, see above
    for name, values in layer.state_dict().items():
        assert torch.equal(values, before[name])
    patient = bn.BatchNorm1d(3, statistics=bn.Sync(), on_single="running")
    own = x.clone().requires_grad_()
    y = patient(own)
    y.sum().backward()
    near(y, x / (1 + 1e-5) ** 0.5, 1e-6)
    assert patient.num_batches_tracked == 0
    for each in (layer, patient):  # one on each is two
        each(torch.full((1, 3), float(dist.get_rank()))).sum().backward()
        assert each.num_batches_tracked == 1
        assert each.running_mean is not None
        near(each.running_mean, torch.full((3,), 0.05).double(), 1e-6)


@on(2)
def what_is_not_finite_on_one_rank_enters_nowhere():
    for kernels, bad in itertools.product(NAMES, [torch.nan, torch.inf]):
        layer = bn.BatchNorm1d(3, statistics=bn.Sync())
        x = torch.randn(4, 3)
        layer(x)
        before = copy.deepcopy(layer.state_dict())
        x[0, 1] = bad if dist.get_rank() else 0.0
        with bn.kernels.use(kernels), pytest.warns(RuntimeWarning, match="inf or nan"):
            layer(x)
        for name, values in layer.state_dict().items():
            assert torch.equal(values, before[name])
        assert layer.num_batches_skipped == 1


@on(2)
def a_gradient_of_a_gradient_goes_over_all_ranks():
    torch.manual_seed(0)
    whole = torch.randn(8, 3, 2, dtype=torch.float64, requires_grad=True)

    def gradients(part: Tensor, statistics: bn.Sync | None) -> list[Tensor]:
        x = part.detach().requires_grad_()
        layer = bn.BatchNorm1d(3, dtype=torch.float64, activation="leaky_relu", statistics=statistics)
        (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        dx.pow(2).sum().backward()
        assert x.grad is not None and layer.weight.grad is not None
        return [dx, x.grad, layer.weight.grad]

    dx, ddx, of_weight = gradients(whole, None)
    for kernels in NAMES:
        with bn.kernels.use(kernels):
            own = gradients(mine(whole), bn.Sync())
        near(own[0], mine(dx), 1e-12)
        near(own[1], mine(ddx), 1e-12)
        near(summed(own[2]), of_weight, 1e-12)


@on(2)
def transforms_are_refused():
    layer = bn.BatchNorm1d(3, statistics=bn.Sync())
    for transform in (torch.func.vmap, torch.func.grad):
        with exchanges([]), pytest.raises(RuntimeError, match=r"Sync .*vmap"):
            transform(lambda x: layer(x).sum())(torch.randn(2, 4, 3))


@on(2)
def copies_are_in_the_group_and_pickles_ask_for_it():
    group = dist.new_group([0, 1])
    layer = bn.BatchNorm1d(3, statistics=bn.Sync(group))
    x = torch.randn(4, 3)
    layer(x)
    for copied in (copy.copy(layer.statistics), copy.deepcopy(layer).statistics):
        assert isinstance(copied, bn.Sync) and copied.process_group is group
    kept = io.BytesIO()
    torch.save(layer.state_dict(), kept)
    kept.seek(0)
    loaded = bn.BatchNorm1d(3, statistics=bn.Sync(group))
    loaded.load_state_dict(torch.load(kept, weights_only=True))
    assert torch.equal(loaded(x), layer(x))
    back = pickle.loads(pickle.dumps(layer))
    back = pickle.loads(pickle.dumps(back))
    with pytest.raises(RuntimeError, match=r"ranks \(0, 1\).*layer.statistics = bn.Sync\(process_group\)"):
        back(x)
    assert torch.equal(back.eval()(x), layer.eval()(x))
    bn.convert_sync(back, group)
    assert torch.equal(back.train()(x), layer.train()(x))


@on(2)
def micro_batches_of_all_ranks_are_one_batch():
    one, two = network().double(), bn.convert_sync(network().double())[0]
    torch.manual_seed(0)
    whole = torch.randn(10, 3, 8, 8, dtype=torch.float64)
    micro = whole.split([2, 3, 1, 4])[2 * dist.get_rank() :][:2]
    three = copy.deepcopy(two)
    wrapped = DistributedDataParallel(three)
    one(whole).pow(2).sum().backward()
    for model in (two, wrapped):
        with bn.virtual_batch(model, micro):
            for x in micro:
                model(x).pow(2).sum().backward()
    for its, together in ((two, summed), (three, lambda mean: 2 * mean)):
        same_state(its, one, 1e-12)
        for mine, whole_s in zip(its.parameters(), one.parameters(), strict=True):
            assert whole_s.grad is not None
            near(together(mine.grad), whole_s.grad, 1e-12)


@on(2)
def domains_have_statistics_of_all_ranks():
    torch.manual_seed(0)
    own, other = torch.randn(2, 8, 3, dtype=torch.float64)
    one = bn.BatchNorm1d(3, dtype=torch.float64)
    two = bn.convert_sync(copy.deepcopy(one))[0]
    for layer, part in ((one, lambda x: x), (two, mine)):
        layer(part(own))
        with bn.domain("other"):
            layer(part(other + 5))
    same_state(two, one, 1e-12)
    assert "domains.other.running_mean" in two.state_dict()


@on(2)
def adapted_to_all_data_ranks_are_the_same():
    torch.manual_seed(0)
    data = torch.randn(2, 8, 3, 8, 8, dtype=torch.float64) * 3 + 1  # two batches of everyone
    for prior in (0, 10):
        one, two = network().double(), bn.convert_sync(network().double())[0]
        adapted = bn.adapt(two, [mine(batch) for batch in data], prior=prior)
        assert bn.adapt(one, list(data), prior=prior).samples == adapted.samples == 16
        same_state(two, one, 1e-12)


@on(4)
def a_rank_without_samples_adapts_to_those_of_the_others():
    torch.manual_seed(0)
    data = torch.randn(32, 3, dtype=torch.float64)
    one = bn.BatchNorm1d(3, dtype=torch.float64)
    two = bn.convert_sync(copy.deepcopy(one))[0]
    bn.adapt(one, [data])
    bn.adapt(two, [mine(data)])
    same_state(two, one, 1e-12)


class Branches(nn.Module):
    """Layers of equal and of other width, and a rank that may go its own way through them."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.other, self.wide = (
            bn.BatchNorm1d(features, statistics=bn.Sync()) for features in (4, 4, 7)
        )
        self.each = bn.BatchNorm1d((4, 3), statistics=bn.Sync())

    def forward(self, path: Sequence[str]) -> Tensor:
        total = torch.zeros(())
        for step in path:
            name, _, masked = step.partition(" ")
            layer = getattr(self, name)
            features = layer.num_features
            shape = features if isinstance(features, tuple) else (features,)
            x = torch.randn(5, *shape, requires_grad=True)
            mask = torch.full((5,), 2) if masked else None
            total = total + layer(x, mask=mask).sum()
        return total


PATHS: dict[str, tuple[Sequence[str], Sequence[str], str, str]] = {
    "equal width": (["narrow"], ["other"], "the moments of layer 'narrow'", "the moments of layer 'other'"),
    "unequal width": (["narrow"], ["wide"], "'narrow': .*1d.4,.* 9 numbers", "'wide': .*1d.7,.* 15 numbers"),
    "another order": (["narrow", "other"], ["other", "narrow"], "layer 'narrow'", "layer 'other'"),
    "caught up": (["narrow", "wide", "other"], ["narrow", "other", "wide"], "layer 'wide'", "layer 'other'"),
    "masks": (["each"], ["each masked"], "'each'.* 25 numbers", "'each'.* 36 numbers"),
    "left out": (
        ["narrow", "wide", "other"],
        ["narrow", "other"],
        "the moments of layer 'wide'",
        "the moments of layer 'other'",
    ),
    "left out at the end": (
        ["narrow", "wide"],
        ["narrow"],
        "the moments of layer 'wide'",
        "the gradient's sums of layer 'narrow'",
    ),
    "twice": (["narrow", "narrow"], ["narrow", "wide"], "the moments of layer 'narrow'", "'wide'"),
}


@on(2)
def ranks_that_differ_all_say_so_and_may_go_on():
    for case, (*paths, ours, theirs) in PATHS.items():
        for known in (0, 1, 2):  # steps before
            model = bn.convert_sync(Branches(), dist.new_group([0, 1]))[0]  # a new group knows nothing
            for _ in range(known):
                model(paths[0]).backward()
            with pytest.raises(RuntimeError, match=f"rank 0: .*{ours}.*rank 1: .*{theirs}"):
                model(paths[dist.get_rank()]).backward()
            model(paths[1]).backward()
            for name, values in model.named_buffers():
                assert torch.equal(summed(values.double()), 2 * values.double()), (case, name)


@on(4)
def of_four_ranks_one_may_differ_and_layers_need_no_module():
    torch.manual_seed(dist.get_rank())
    first, second = (bn.BatchNorm1d(3, statistics=bn.Sync()) for _ in range(2))
    layers = [bn.BatchNorm1d(3, statistics=bn.Sync()) for _ in range(2)]
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"ranks 0, 1, 3: .*layer 'first'.*rank 2: .*layer 'second'"):
            (second if dist.get_rank() == 2 else first)(torch.randn(5, 3))
        with pytest.raises(RuntimeError, match=r"layer 'layers\[0\]'.*layer 'layers\[1\]'"):
            layers[dist.get_rank() % 2](torch.randn(5, 3))
        first(torch.randn(5, 3))


@on(2)
def what_is_remembered_of_long_steps_has_an_end():
    group = dist.new_group([0, 1])
    model = bn.convert_sync(Branches(), group)[0]
    names = ["narrow", "other", "wide"]
    with mock.patch.object(exchange_of, "_LONGEST_STEP", 9):
        for step in range(8):  # of 8 to 12 exchanges
            model(names + names[step % 3 :]).backward()
        assert len(exchange_of._protocol(group)._history._past) < 18
        with pytest.raises(RuntimeError, match=r"rank 0: .*layer 'narrow'.*rank 1: .*layer 'other'"):
            model([names[dist.get_rank()]])


@on(2)
def a_layer_is_the_same_within_a_wrapper():
    model = nn.Sequential(bn.BatchNorm1d(3, statistics=bn.Sync()), bn.BatchNorm1d(3, statistics=bn.Sync()))
    wrapped = nn.ModuleDict({"module": model})
    called = model if dist.get_rank() else lambda x: Wrapper(wrapped)(x)
    for expect in (unknown, unknown, exchanges):
        with expect(FORWARD * 2):
            y = called(torch.randn(4, 3, requires_grad=True))
        with expect(BACKWARD * 2):
            y.sum().backward()


class Wrapper(nn.Module):
    def __init__(self, inner: nn.ModuleDict) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["module"](x)  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


def lost(way: str, where: str) -> None:
    """The second of three ranks does not come to an exchange of the layer body.1, forward or backward."""
    group = dist.new_group(timeout=timedelta(seconds=PATIENCE if way == "hangs" else 60))
    model = bn.convert_sync(Model(), group)[0]

    def fall_out(*_: object) -> None:
        if way == "hangs":
            time.sleep(10 * PATIENCE)
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 1:
        layer = model.body[1]
        if where == "forward":
            layer.register_forward_pre_hook(fall_out)
        else:
            layer.register_forward_hook(lambda _, __, y: y.register_hook(fall_out) and None)
    y = model(torch.randn(3, 4, requires_grad=True))
    print("forward is done", flush=True)
    y.sum().backward()


for way, where in itertools.product(("dies", "hangs"), ("forward", "backward")):
    TASKS[3][f"a_rank_{way}_{where}"] = partial(lost, way, where)


def main(rank: int, count: int, store: str, names: list[str]) -> None:
    """Tasks of one of `count` ranks, which meet in the file `store`."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(100, exit=True)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        timeout=timedelta(seconds=60),
        world_size=count,
        rank=rank,
    )
    for name in names:
        TASKS[dist.get_world_size()][name]()
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"{name}: done", flush=True)
    dist.destroy_process_group()
