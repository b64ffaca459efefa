"""The layers against torch's: state, conversions, tools, errors; and torch's own module tests as the oracle."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from tests.constructors import each_layer, each_setting

STATISTICS = ["running_mean", "running_var"]
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def used(kind, shape=(6, 3), **options):
    """A layer whose every number is its own: no ones or zeros left that could be mistaken for each other."""
    layer = kind(3, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    for _ in range(3):
        layer(2 * torch.randn(shape, dtype=options.get("dtype")) + 1)
    return layer


def exactly(a, b):
    assert_close(a, b, rtol=0, atol=0)


# --- the same numbers as torch's layers, in every setting


@each_setting
@each_layer
def test_trains_and_evaluates_as_torch_s(ours, torch_s, shape, options):
    a, b = ours(3, **options, dtype=torch.float64), torch_s(3, **options, dtype=torch.float64)
    assert isinstance(a, torch_s)
    for training in (True, True, False, True, False):
        x = torch.randn(shape, dtype=torch.float64) + 1
        assert_close(a.train(training)(x), b.train(training)(x))
    assert_close(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("before", [True, False])
def test_track_running_stats_toggled_after_construction(before):
    layers = [
        kind(3, track_running_stats=before, dtype=torch.float64) for kind in (bn.BatchNorm1d, nn.BatchNorm1d)
    ]
    for tracking in (before, not before, before):
        x = torch.randn(5, 3, dtype=torch.float64) + 1
        for training in (True, False):
            outputs = []
            for layer in layers:
                layer.track_running_stats = tracking
                outputs.append(layer.train(training)(x))
            assert_close(*outputs)
    assert_close(*(layer.state_dict() for layer in layers))


def test_running_statistics_removed_by_hand():
    layers = [kind(3).eval() for kind in (bn.BatchNorm1d, nn.BatchNorm1d)]
    x = torch.randn(5, 3) + 1
    for layer in layers:
        layer.running_mean = layer.running_var = None
    assert_close(*(layer(x) for layer in layers))


@pytest.mark.parametrize("name", STATISTICS)
def test_one_running_statistic_removed_by_hand_is_refused_as_torch_s(name):
    for kind in (nn.BatchNorm1d, bn.BatchNorm1d):
        layer = kind(3).eval()
        setattr(layer, name, None)
        with pytest.raises(RuntimeError, match="must be defined in evaluation mode"):
            layer(X)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_without_a_count_of_batches(momentum):
    layers = [kind(3, momentum=momentum, dtype=torch.float64) for kind in (bn.BatchNorm1d, nn.BatchNorm1d)]
    for layer in layers:
        layer(X.double())
        layer.num_batches_tracked = None
    for training in (True, True, False):
        x = torch.randn(5, 3, dtype=torch.float64) + 1
        assert_close(*(layer.train(training)(x) for layer in layers))
    assert_close(*(layer.state_dict() for layer in layers))


@pytest.mark.parametrize("tracking", [True, False])
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_buffers_registered_by_hand(momentum, counted, tracking):
    # A layer built with track_running_stats=False has all buffers, as None.
    layers = [
        kind(3, momentum=momentum, track_running_stats=False, dtype=torch.float64)
        for kind in (bn.BatchNorm1d, nn.BatchNorm1d)
    ]
    for layer in layers:
        layer.track_running_stats = tracking
        layer.register_buffer("running_mean", torch.full((3,), 0.5, dtype=torch.float64))
        layer.register_buffer("running_var", torch.full((3,), 2.0, dtype=torch.float64))
        if counted:
            layer.register_buffer("num_batches_tracked", torch.tensor(0))
    for training in (True, True, False):
        x = torch.randn(5, 3, dtype=torch.float64) + 1
        assert_close(*(layer.train(training)(x) for layer in layers))
    assert_close(*(layer.state_dict() for layer in layers))


# --- state


@each_layer
def test_a_checkpoint_moves_both_ways(ours, torch_s, shape):
    for source, target in ((ours, torch_s), (torch_s, ours)):
        state, other = used(source, shape).state_dict(), target(3)
        assert list(state) == list(other.state_dict())
        assert other.load_state_dict(state) == ([], [])
        exactly(other.state_dict(), state)


def test_an_old_checkpoint_without_num_batches_tracked_loads():
    state = nn.BatchNorm1d(3).state_dict()
    del state["num_batches_tracked"]
    assert bn.BatchNorm1d(3).load_state_dict(dict(state)) == ([], [])  # a dict has no version either


@pytest.mark.parametrize("assign", [True, False])
def test_a_bfloat16_checkpoint_leaves_the_statistics_float32(assign):
    state = used(nn.BatchNorm1d).bfloat16().state_dict()
    layer = bn.BatchNorm1d(3)
    layer.load_state_dict(state, assign=assign)
    assert layer.weight.dtype == (torch.bfloat16 if assign else torch.float32)
    for name in STATISTICS:
        assert layer.get_buffer(name).dtype == torch.float32
        exactly(layer.get_buffer(name), state[name].float())


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("make_copy", COPIES)
def test_copies_are_equal_and_apart(make_copy):
    layer = used(bn.BatchNorm1d, activation="relu", momentum=None)
    copied, before = COPIES[make_copy](layer), copy.deepcopy(layer.state_dict())
    exactly(copied.state_dict(), before)
    assert repr(copied) == repr(layer)
    x = torch.randn(4, 3)
    exactly(copied(x), layer(x))
    exactly(copied.state_dict(), layer.state_dict())
    copied(x)
    assert copied.num_batches_tracked == layer.num_batches_tracked + 1


def test_saved_and_loaded_with_weights_only():
    file, state = io.BytesIO(), used(bn.BatchNorm1d).state_dict()
    torch.save(state, file)
    file.seek(0)
    exactly(torch.load(file, weights_only=True), state)


CONVERSIONS = {
    "half": (lambda layer: layer.half(), torch.float16, torch.float32),
    "bfloat16": (lambda layer: layer.bfloat16(), torch.bfloat16, torch.float32),
    "to": (lambda layer: layer.to(torch.bfloat16), torch.bfloat16, torch.float32),
    "to with device": (lambda layer: layer.to("cpu", torch.float16), torch.float16, torch.float32),
    "double": (lambda layer: layer.double(), torch.float64, torch.float64),
    "within a model": (lambda layer: nn.Sequential(layer).half()[0], torch.float16, torch.float32),
    "there and back": (lambda layer: layer.half().float(), torch.float32, torch.float32),
    "narrower still": (lambda layer: layer.double().half(), torch.float16, torch.float32),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions_leave_the_statistics_exact(conversion):
    convert, of_parameters, of_statistics = CONVERSIONS[conversion]
    layer = used(bn.BatchNorm1d)
    before = {name: layer.get_buffer(name).clone() for name in STATISTICS}
    layer = convert(layer)
    assert layer.weight.dtype == of_parameters
    assert layer.num_batches_tracked.dtype == torch.long
    for name in STATISTICS:
        assert layer.get_buffer(name).dtype == of_statistics
        exactly(layer.get_buffer(name), before[name].to(of_statistics))
    assert layer(torch.randn(4, 3).to(of_parameters)).dtype == of_parameters


@pytest.mark.parametrize(("dtype", "expected"), [
    (None, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
])  # fmt: skip
def test_the_constructor_s_dtype_is_that_of_the_parameters(dtype, expected):
    layer = bn.BatchNorm2d(3, dtype=dtype)
    assert layer.weight.dtype == layer.bias.dtype == (dtype or torch.float32)
    assert {layer.get_buffer(name).dtype for name in STATISTICS} == {expected}


def test_made_on_meta_and_materialised():
    layer = bn.BatchNorm1d(3, device="meta", dtype=torch.float16)
    assert layer(torch.empty(4, 3, device="meta", dtype=torch.float16)).shape == (4, 3)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    exactly(layer.state_dict(), bn.BatchNorm1d(3, dtype=torch.float16).state_dict())
    assert layer.num_batches_skipped == 0


def test_stored_in_float8_its_statistics_stay():
    # torch converts such a layer too; only its forward refuses, until it is converted back.
    layer = used(bn.BatchNorm1d)
    before = {name: layer.get_buffer(name).clone() for name in STATISTICS}
    layer.to(torch.float8_e4m3fn)
    assert layer.weight.dtype == torch.float8_e4m3fn
    exactly({name: layer.get_buffer(name) for name in STATISTICS}, before)
    made = bn.BatchNorm1d(3, dtype=torch.float8_e5m2)
    assert {made.get_buffer(name).dtype for name in STATISTICS} == {torch.float32}


THEN = {
    "as it is": lambda model: model,
    "double": lambda model: model.double(),
    "to the same device": lambda model: model.to("cpu"),
    "half": lambda model: model.half(),
    "copied": copy.deepcopy,
}


@pytest.mark.parametrize("then", THEN)
def test_made_on_meta_and_a_checkpoint_assigned(then):
    # The counter is not in the checkpoint, so that nothing is assigned to it: it must not stay on meta.
    with torch.device("meta"):
        model = nn.Sequential(nn.Identity(), bn.BatchNorm1d(3))
    checkpoint = nn.Sequential(nn.Identity(), nn.BatchNorm1d(3)).state_dict()
    assert model.load_state_dict(checkpoint, assign=True) == ([], [])
    model = THEN[then](model)
    layer = model[1]
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert layer.num_batches_skipped == 0
    with pytest.warns(RuntimeWarning, match="'1': BatchNorm1d.* inf or nan"):
        model(torch.full((4, 3), torch.nan, dtype=layer.weight.dtype))
    model(torch.randn(4, 3).to(layer.weight.dtype))
    assert (layer.num_batches_skipped, layer.num_batches_tracked) == (1, 1)


@pytest.mark.parametrize("way", ["to_empty", "skip_init", "within a model"])
def test_what_is_materialised_empty_has_skipped_nothing(way, monkeypatch):
    # What an empty tensor holds is arbitrary; here it is 7.
    monkeypatch.setattr(torch, "empty_like", lambda t, **options: torch.full_like(t, 7, **options))
    if way == "skip_init":
        layer = nn.utils.skip_init(bn.BatchNorm1d, 3)
    else:
        layer = bn.BatchNorm1d(3, device="meta")
        (nn.Sequential(layer) if way == "within a model" else layer).to_empty(device="cpu")
    assert (layer.weight == 7).all()
    assert layer.num_batches_skipped == 0
    counter = layer.num_batches_skipped
    assert layer.load_state_dict(nn.BatchNorm1d(3).state_dict()) == ([], [])
    assert layer.num_batches_skipped is counter
    with pytest.warns(RuntimeWarning, match="inf or nan"):
        layer(X * torch.nan)
    assert counter == 1


@pytest.mark.parametrize("momentum", [0.1, None])
def test_buffers_are_written_in_place(momentum):
    # Whoever holds a buffer, an optimiser, a CUDA graph or DDP, must see it move.
    layer = bn.BatchNorm1d(3, momentum=momentum)
    before = {name: (buffer, buffer.data_ptr()) for name, buffer in layer.named_buffers()}
    assert list(before) == [*STATISTICS, "num_batches_tracked"]  # as torch's: averages pair them by position
    layer(torch.randn(4, 3))
    layer(torch.empty(0, 3))
    with pytest.warns(RuntimeWarning, match="inf or nan"):
        layer(torch.full((4, 3), torch.nan))
    layer.eval()(torch.randn(4, 3))
    layer.reset_running_stats()
    for name, (buffer, address) in before.items():
        assert layer.get_buffer(name) is buffer
        assert buffer.data_ptr() == address


# --- what it says


@each_layer
def test_its_repr_is_torch_s_with_the_activation(ours, torch_s, shape):
    assert repr(ours(3, momentum=None)) == repr(torch_s(3, momentum=None))
    assert repr(ours(3, activation="relu")) == repr(torch_s(3))[:-1] + ", activation='relu')"
    assert "(activation): GELU" in repr(ours(3, activation=nn.GELU()))


def test_an_activation_that_is_a_module_is_a_submodule():
    layer = bn.BatchNorm1d(3, activation=nn.PReLU())
    assert "activation.weight" in dict(layer.named_parameters())


@pytest.mark.parametrize("activation", [nn.ReLU, ["relu"], 3])
def test_what_is_no_activation_is_refused_at_once(activation):
    with pytest.raises(ValueError, match=r"activation .*(ReLU\(\)|use \"relu\")"):
        bn.BatchNorm1d(3, activation=activation)
    with pytest.raises(ValueError, match="activation"):
        bn.batch_norm(X, None, None, training=True, activation=activation)


def test_an_unknown_activation_is_refused_at_once():
    with pytest.raises(ValueError, match=r"unknown activation 'rleu': use \"relu\""):
        bn.BatchNorm1d(3, activation="rleu")


RANKS = {bn.BatchNorm1d: (2, 3), bn.BatchNorm2d: (4,), bn.BatchNorm3d: (5,)}


@pytest.mark.parametrize("kind", RANKS)
@pytest.mark.parametrize("rank", range(1, 7))
def test_takes_the_ranks_that_torch_takes(kind, rank):
    x = torch.randn((2, 3, 2, 2, 2, 2)[:rank])
    torch_s = getattr(nn, kind.__name__)
    if rank in RANKS[kind]:
        assert_close(kind(3)(x), torch_s(3)(x))
        return
    with pytest.raises(ValueError, match="expected") as refusal:
        torch_s(3)(x)
    advice = f"use BatchNorm{rank - 2 if rank > 2 else 1}d" if 1 < rank < 6 else "reshape it"
    with pytest.raises(ValueError, match=rf": {kind.__name__} takes \(N, C.*{advice}") as caught:
        kind(3)(x)
    assert str(caught.value).startswith(str(refusal.value))


WRONG = {
    "rank": (torch.randn(4, 3), ValueError),
    "channels": (torch.randn(4, 5, 2, 2), RuntimeError),
    "one value": (torch.randn(1, 3, 1, 1), ValueError),
    "integers": (torch.ones(4, 3, 2, 2, dtype=torch.int32), NotImplementedError),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_error_names_the_layer(wrong):
    x, kind = WRONG[wrong]
    layer = bn.BatchNorm2d(3)
    with pytest.raises(kind) as caught:
        nn.Sequential(nn.Sequential(nn.Identity(), layer))(x)
    assert caught.value.__notes__ == [f"in layer '0.1': {layer}"]


def test_an_error_of_the_residual_names_the_layer():
    with pytest.raises(ValueError, match="residual") as caught:
        bn.BatchNorm1d(3)(torch.randn(4, 3), torch.randn(4, 1))
    assert caught.value.__notes__ == [f"in layer {bn.BatchNorm1d(3)}"]


# --- tools
