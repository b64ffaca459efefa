"""Which kernels compute: the environment, `use`, and an installation without the native ones."""

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.kernels import choice, native, reference
from tests.kernels.processes import WITHOUT_NATIVE, said
from tests.mutations.mutation import Mutation

pytestmark = pytest.mark.skipif(not choice.built(), reason="installed without native kernels")


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    monkeypatch.setattr(choice, "_chosen", "native")


# --- the environment

ACTIVE = "import batchnorm as bn\nprint(bn.kernels.active())"


@pytest.mark.parametrize(
    ("variable", "active"),
    [(None, "native"), ("", "native"), ("native", "native"), ("torch", "torch"), ("reference", "reference")],
)
def test_the_environment_says_what_a_process_starts_with(variable, active):
    assert said(ACTIVE, variable) == active


def test_an_unknown_name_in_the_environment_is_an_error_that_names_it_and_the_three():
    code = """
    import batchnorm as bn, torch
    for call in (bn.kernels.active, lambda: bn.BatchNorm1d(2)(torch.ones(3, 2))):
        try:
            call()
        except ValueError as error:
            print(error)
    """
    lines = said(code, "fast").splitlines()
    assert len(lines) == 2
    for name in ("BATCHNORM_KERNELS", "'fast'", "native", "torch", "reference"):
        assert all(name in line for line in lines)


def test_what_was_used_goes_before_the_environment():
    code = "import batchnorm as bn\nbn.kernels.use('torch')\nprint(bn.kernels.active())"
    assert said(code, "reference") == "torch"


def test_a_with_block_that_is_the_first_to_choose_gives_back_to_the_environment():
    code = """
    import batchnorm as bn
    with bn.kernels.use("torch"):
        pass
    print(bn.kernels.active())
    """
    assert said(code, "reference") == "reference"


# --- use


def computing(monkeypatch):
    """Which kernels a call of batch_norm really reaches."""
    reached = []
    for name, module, function in (
        ("native", native, "forward"),
        ("torch", torch, "batch_norm"),
        ("reference", reference, "normalise"),
    ):
        real = getattr(module, function)

        def seen(*args, name=name, real=real, **options):
            reached.append(name)
            return real(*args, **options)

        monkeypatch.setattr(module, function, seen)
    bn.batch_norm(torch.randn(4, 3), None, None, training=True)
    monkeypatch.undo()
    return reached


@pytest.mark.parametrize("name", choice.NAMES)
def test_use_as_a_call_lasts(name):
    bn.kernels.use(name)
    assert bn.kernels.active() == name
    with pytest.MonkeyPatch.context() as patch:
        assert computing(patch) == [name]


def test_use_as_a_context_manager_ends_with_its_block():
    with bn.kernels.use("torch"):
        assert bn.kernels.active() == "torch"
        with bn.kernels.use("reference"):
            assert bn.kernels.active() == "reference"
            with bn.kernels.use("native"):
                assert bn.kernels.active() == "native"
            assert bn.kernels.active() == "reference"
        assert bn.kernels.active() == "torch"
    assert bn.kernels.active() == "native"


def test_use_gives_back_after_an_exception_and_lets_it_pass():
    with pytest.raises(KeyError), bn.kernels.use("torch"), bn.kernels.use("reference"):
        raise KeyError
    assert bn.kernels.active() == "native"


@pytest.mark.parametrize("name", ["", "Native", "cuda", None])
def test_use_of_an_unknown_name_names_the_three_and_changes_nothing(name):
    with pytest.raises(ValueError, match="use one of native, torch, reference"):
        bn.kernels.use(name)
    assert bn.kernels.active() == "native"


@pytest.mark.slow
def test_a_compiled_layer_follows_the_choice():
    layer = torch.compile(bn.BatchNorm1d(3), backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 3)
    expected = nn.BatchNorm1d(3)(x)
    for name in choice.NAMES:
        with bn.kernels.use(name), pytest.MonkeyPatch.context() as patch:
            calls: list[int] = []
            real = native.forward
            patch.setattr(native, "forward", lambda *a, real=real, calls=calls: calls.append(1) or real(*a))
            assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
            assert len(calls) == (name == "native")


# --- without the compiled module


def test_without_the_native_kernels_it_says_so_once_and_computes_with_torch_s():
    code = f"""{WITHOUT_NATIVE}
import warnings
import torch
import batchnorm as bn

with warnings.catch_warnings(record=True) as given:
    warnings.simplefilter("always")
    for _ in range(3):
        assert bn.kernels.active() == "torch"
        bn.BatchNorm1d(2)(torch.randn(4, 2))
        with bn.kernels.use("reference"):
            bn.BatchNorm1d(2)(torch.randn(4, 2))
(only,) = given
assert only.category is RuntimeWarning, only
print(only.message)
try:
    bn.kernels.use("native")
except RuntimeError as error:
    print(error)
assert bn.kernels.active() == "torch"
"""
    warned, refused = said(code).splitlines()
    assert "computes with torch's" in warned
    assert "BATCHNORM_KERNELS=torch" in warned
    assert "no native kernels" in refused
    assert all("compiler" in line and "install the package again" in line for line in (warned, refused))


@pytest.mark.parametrize("variable", ["torch", None])
def test_without_the_native_kernels_every_layer_trains_as_torch_s(variable):
    code = f"""{WITHOUT_NATIVE}
import copy, warnings
import torch
from torch import nn
import batchnorm as bn

torch.manual_seed(0)
warnings.simplefilter("error")
if {variable is None}:
    warnings.filterwarnings("ignore", "batchnorm was installed without", RuntimeWarning)
layers = ("BatchNorm1d", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
for name, shape in zip(layers, ((6, 3), (6, 3, 4), (4, 3, 2, 3), (2, 3, 2, 3, 2))):
    for dtype in (torch.float32, torch.float64):
        ours, theirs = (getattr(kind, name)(3, dtype=dtype) for kind in (bn, nn))
        ours.activation = "relu"
        for training in (True, True, False):
            x, residual = torch.randn(2, *shape, dtype=dtype).unbind()
            asked = [x.requires_grad_(), residual.requires_grad_()]
            outputs = [
                ours.train(training)(x, residual),
                torch.relu(theirs.train(training)(x) + residual),
            ]
            gradients = [
                torch.autograd.grad(y.sin().sum(), [*asked, *layer.parameters()])
                for y, layer in zip(outputs, (ours, theirs))
            ]
            torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), atol=1e-6, rtol=1e-6)
print(bn.kernels.active())
"""
    assert said(code, variable) == "torch"


def test_with_the_native_kernels_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice._first() == "native"


MUTATIONS = [
    Mutation(
        "BATCHNORM_KERNELS ignored", "kernels/choice.py",
        """os.environ.get(_VARIABLE) or "native\"""", "'native'",
        "a process starts with the native kernels whatever it was told",
    ),
    Mutation(
        "a warning with each use", "kernels/choice.py",
        "    _chosen = cast(Name, name)\n    return _chosen", "    return cast(Name, name)",
        "once in a process is enough",
    ),
    Mutation(
        "the kernels chosen before forgotten", "kernels/choice.py",
        "        _chosen = self._before", "        _chosen = None",
        "after a with block inside another",
    ),
]  # fmt: skip
