"""Uses every public name; tests/test_core_alone.py runs it where nothing but torch can be imported.

As a program: `python tests/every_public_name.py PACKAGE ...`, with the names of what cannot be imported.
"""

import sys
import tempfile
import warnings

del sys.path[0]  # this folder, whose `statistics` is not Python's

# As for a package that is not installed: an import raises ModuleNotFoundError, find_spec returns None.
modules: dict[str, object] = sys.modules  # type: ignore[assignment]  # None marks what is not there
modules.update(dict.fromkeys(sys.argv[1:]))

import torch  # noqa: E402  # the first import after the packages are gone
from torch import nn  # noqa: E402

import batchnorm  # noqa: E402

warnings.simplefilter("error")  # not before: torch itself warns where there is no numpy


class Asked:
    """The package; keeps the names it was asked for."""

    def __init__(self):
        self.names = set()

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(batchnorm, name)


bn = Asked()
torch.manual_seed(0)
x = torch.randn(8, 4, 5, 5) + 3

assert bn.__version__


# Plain torch, here and in `train`: torch.testing and torch.optim take eight seconds to import.
def close(a, b):
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def values():
    """The values and the function."""
    parts = [bn.Moments.of(part) for part in x.split(3)]
    whole = parts[0].merge(*parts[1:])
    close(whole.variance(unbiased=True).float(), x.var((0, 2, 3)))
    affine = bn.Affine.of(whole, None, None, 1e-5)
    half = bn.Affine(torch.full((4,), 0.5), torch.zeros(4))
    output = bn.batch_norm(x, None, None, training=True)
    close(output, nn.functional.batch_norm(x, None, None, training=True))
    close(half.compose(affine)(x), output / 2)


def train(layer, shape):
    """A step of training, and evaluation after it."""
    before = layer.weight.detach().clone()
    input = torch.randn(shape, requires_grad=True)
    layer(input, torch.randn(shape)).square().mean().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= 0.1 * parameter.grad
    assert input.grad is not None
    assert not layer.weight.equal(before)
    assert layer.eval()(input).isfinite().all()
    other = type(layer)(layer.num_features)
    other.load_state_dict(layer.state_dict())
    close(other.running_var, layer.running_var)


def layers():
    """The layers, each kind of statistics, masks and domains."""
    train(bn.BatchNorm1d(4, activation="relu"), (8, 4))
    train(bn.BatchNorm2d(4, activation="silu", momentum=None), (8, 4, 3, 3))
    train(bn.BatchNorm3d(4, debiased=True), (4, 4, 2, 3, 3))
    train(bn.BatchNorm((4, 3)), (8, 4, 3))
    for lazy, shape in (
        (bn.LazyBatchNorm1d, (8, 4)),
        (bn.LazyBatchNorm2d, (8, 4, 3, 3)),
        (bn.LazyBatchNorm3d, (4, 4, 2, 3, 3)),
    ):
        layer = lazy(activation="relu")
        layer(torch.randn(shape))
        train(layer, shape)
    limits = bn.Renorm(bn.Ramp(1, 3, 0, 10), bn.Ramp(0, 5, 0, 10))
    for statistics in (bn.Ghost(4), bn.Sync(), bn.Population(), limits, bn.Renorm.scheduled()):
        train(bn.BatchNorm2d(4, statistics=statistics), (8, 4, 3, 3))
    layer = bn.BatchNorm1d(4)
    padded = layer(torch.randn(2, 4, 6), mask=torch.tensor([6, 2]))
    assert padded[1, :, 2:].eq(0).all()
    with bn.domain("other"):
        layer(torch.randn(8, 4))
    assert "domains.other.running_mean" in layer.state_dict()


def passes():
    """What changes a model."""
    block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model, report = bn.upgrade(nn.Sequential(block, nn.Flatten(), nn.Linear(36, 2), nn.BatchNorm1d(2)))
    assert report.summary == "2 layers: 1 fused, 1 swapped"
    inputs = x.split(4)
    with bn.virtual_batch(model, inputs):
        for part in inputs:
            model(part).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with bn.adapt(model, [x], prior=8):
        model.eval()(x)
    model, report = bn.convert_sync(model)
    assert report.count("synchronized") == 2
    model, report = bn.freeze(model, affine=True)
    assert report["0.1"].outcome == "frozen"
    before = model[0][1].running_mean.clone()
    model.train()(x)
    assert model[0][1].running_mean.equal(before)
    model, report = bn.unfreeze(model)
    model(x)
    assert not model[0][1].running_mean.equal(before)
    before = model[0][1].running_mean.clone()
    with bn.paused(model):
        model(x)
    assert model[0][1].running_mean.equal(before)
    with bn.mask(model, torch.rand(len(x), *x.shape[2:]) < 0.5):
        model(x)
    folded, report = bn.fold(model, x)
    assert report.count("folded") == 2
    with tempfile.TemporaryDirectory() as folder:
        exported = bn.export(model, f"{folder}/model.pt2", x)
        assert exported.folded.count("folded") == 2
    model, report = bn.strip_bias(model, x)
    assert report.count("stripped") == 2
    close(model.eval()(x), folded(x))
    model.train()
    report = bn.population(model, [x, x + 1])
    assert report.count("measured") == 2
    state = model.state_dict()
    assert bn.merge_states([(state, 10), (state, 10)]).keys() == state.keys()
    assert all("running" not in name for name in bn.split_state(state)[0])
    assert bn.reduce_statistics(model) == ["0.1", "3"]
    optimizer = torch.optim.SGD(bn.param_groups(model, 1e-4), lr=0.1)
    assert [group["name"] for group in optimizer.param_groups] == ["weights", "normalization"]
    model, report = bn.configure(model, momentum=0.2, only="0.*")
    assert report["0.1"].what == "momentum=0.2" and model[3].momentum == 0.1
    mean = bn.average(model, decay=None, statistics="measured")
    mean.update_parameters(model)
    assert mean.measure([x, x + 1]).count("measured") == 2
    model[3].momentum = 0.99
    assert [each.layer for each in bn.examine(model, [x, x + 1], optimizer, select=["BN201"])] == ["3"]
    with bn.watch(model, optimizer) as doctor:
        model(x).square().mean().backward()
        optimizer.step()
    assert doctor.steps.number == 1 and doctor.findings.at("3")
    with bn.ShiftMeter(model, optimizer, every=1) as meter:
        model(x).square().mean().backward()
        optimizer.step()
    assert [each.layer for each in meter.history] == ["0.1", "3"]
    first, second = meter.gradient_shift(lambda: model(x).square().mean())
    assert first.shift == 0 < second.shift
    plain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    before = plain.eval()(x)
    plain, report = bn.insert(plain, x, identity=[x])
    assert report.count("inserted") == 1
    close(plain(x), before)
    assert bn.zero_init_residual(plain, x)[1].count("left alone") == 1
    model, report = bn.save_memory(model)
    assert report.count("recomputed") == 2
    model(x).sum().backward()
    model, report = bn.downgrade(model, sync=False)
    assert report.count("downgraded") == 2 and type(model[0][2]) is nn.ReLU


def bridges():
    """Layers of other libraries."""
    layer = bn.BatchNorm2d(4, eps=1e-3)
    layer(x)
    for library in bn.bridges.LIBRARIES:
        values, settings = bn.bridges.write(library, layer)
        settings.pop("scale", None)
        close(bn.bridges.read(library, values, **settings)(x), layer.eval()(x))


def process():
    """The settings of the process."""
    chosen = bn.kernels.active()
    for name in ("torch", "reference"):
        with bn.kernels.use(name):
            assert bn.kernels.active() == name
            values()
    assert bn.kernels.active() == chosen
    assert (bn.kernels.instruction_set() != "") == (chosen == "native")
    assert bn.keep_memory() == bn.return_memory()


values()
layers()
passes()
bridges()
process()
unused = set(dir(batchnorm)) - bn.names
assert not unused, f"public names that are not used here: {sorted(unused)}"
