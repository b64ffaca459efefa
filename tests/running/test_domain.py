"""Named sets of running statistics: what separate layers that share weight and bias would have."""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from tests.constructors import each_layer, each_setting
from tests.mutations.mutation import Mutation

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
OWN = list(nn.BatchNorm1d(3).state_dict())
# where each batch goes: None is the layer's own set
VISITS = ["clean", None, "noisy", "clean", "clean", None, "noisy", "clean"]


def batch(k, shape=(6, 3), **options):
    generator = torch.Generator().manual_seed(k)
    return (1 + k) * torch.randn(shape, generator=generator, **options) + 3 * k


def kept(layer, name=None):
    """The three buffers of a set, or of a layer of torch's."""
    return {key: (layer if name is None else layer.domains[name]).get_buffer(key) for key in STATISTICS}


def visited(*names):
    layer = bn.BatchNorm1d(3)
    for k, name in enumerate(names):
        with bn.domain(name):
            layer(batch(k))
    return layer


def separate(torch_s, options):
    """A layer of torch's for each set, with one weight and bias."""
    layers = {name: torch_s(3, **options) for name in (None, "clean", "noisy")}
    for layer in layers.values():
        layer.weight, layer.bias = layers[None].weight, layers[None].bias
    return layers


@each_setting
@each_layer
def test_each_set_is_that_of_a_separate_layer(ours, torch_s, shape, options):
    layer = ours(3, dtype=torch.float64, **options)
    layers = separate(torch_s, {"dtype": torch.float64, **options})
    for training in (True, False):
        layer.train(training)
        for k, name in enumerate(VISITS):
            x = batch(k, shape, dtype=torch.float64)
            with bn.domain(name):
                out = layer(x)
            expected = layers[name].train(training)(x)
            assert_close(out, expected, rtol=1e-10, atol=1e-10)
            if expected.requires_grad:  # gradients add up over all sets
                out.sin().sum().backward()
                expected.sin().sum().backward()
    for name in layers:
        if layer.track_running_stats:
            assert_close(kept(layer, name), kept(layers[name]))
    for ours_s, theirs in zip(layer.parameters(), layers[None].parameters(), strict=True):
        assert_close(ours_s.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def test_a_set_moves_alone():
    layer = visited(None, "a", "b")
    before = copy.deepcopy(layer.state_dict())
    with bn.domain("b"):
        layer(batch(7))
    moved = {key for key, value in layer.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {f"domains.b.{name}" for name in STATISTICS}


def test_a_layer_that_keeps_no_statistics_makes_no_set():
    layer = bn.BatchNorm1d(3, track_running_stats=False)
    x = batch(1)
    with bn.domain("a"):
        for each in (layer.train(), layer.eval()):
            assert_close(each(x), nn.BatchNorm1d(3)(x))
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_contexts_nest():
    layer, xs = bn.BatchNorm1d(3, momentum=1.0), [batch(k) for k in range(6)]
    layer(xs[0])
    with bn.domain("a"):
        layer(xs[1])
        with bn.domain("b"):
            layer(xs[2])
            with bn.domain(None):
                layer(xs[3])
        layer(xs[4])
    layer(xs[5])
    for name, count, last in (("a", 2, 4), ("b", 1, 2), (None, 3, 5)):
        found = kept(layer, name)
        assert found["num_batches_tracked"] == count
        assert_close(found["running_mean"], xs[last].mean(0))


def test_an_exception_ends_it():
    layer = bn.BatchNorm1d(3)
    with bn.domain("outer"):
        with pytest.raises(ZeroDivisionError), bn.domain("inner"):
            raise ZeroDivisionError
        layer(batch(0))
    with pytest.raises(ValueError, match="Expected more than 1 value"), bn.domain("single"):
        layer(batch(0)[:1])
    layer(batch(0))
    assert kept(layer, "outer")["num_batches_tracked"] == kept(layer)["num_batches_tracked"] == 1


@pytest.mark.parametrize("wrong", ["", ".", "a.b", "a."])
def test_a_name_must_fit_into_a_key(wrong):
    with pytest.raises(ValueError, match="state_dict"), bn.domain(wrong):
        pass


@pytest.mark.parametrize("wrong", ["train", "eval", "training", "keys", "_modules"])
def test_a_name_must_not_be_a_modules_own(wrong):
    with pytest.raises(ValueError, match=f"'{wrong}' is no name for a domain"), bn.domain(wrong):
        pass


@pytest.mark.parametrize(("known", "listed"), [((), "none"), (("noisy", "clean"), "noisy, clean")])
def test_an_unknown_domain_is_not_evaluated(known, listed):
    layer = visited(*known).eval()
    model, before = nn.Sequential(nn.ReLU(), layer), copy.deepcopy(layer.state_dict())
    said = rf"of domain 'target' \(there are: {listed}\).*bn\.domain\('target'\)"
    with pytest.raises(RuntimeError, match=said) as raised, bn.domain("target"):
        model(batch(0))
    assert any("'1'" in note for note in raised.value.__notes__)
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["weight", "domains", "running_mean", "0", "a b", "é"])
def test_a_name_may_be_any_word(name):
    layer = bn.BatchNorm1d(3)
    with bn.domain(name):
        layer(batch(1))
    fresh = bn.BatchNorm1d(3)
    fresh.load_state_dict(layer.state_dict())
    assert f"domains.{name}.running_mean" in layer.state_dict()
    with bn.domain(name):
        assert_close(fresh.eval()(batch(2)), layer.eval()(batch(2)), rtol=0, atol=0)


def test_keys_of_the_state_dict():
    keys = [f"domains.{name}.{key}" for name in ("a", "b") for key in STATISTICS]
    assert list(visited("a", None, "b").state_dict()) == [*OWN, *keys]
    assert list(visited(None).state_dict()) == OWN


def model():
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(bn.BatchNorm1d(3), nn.ReLU()), bn.BatchNorm1d(3))


def trained(network):
    for k, name in enumerate(VISITS):
        with bn.domain(name):
            network(batch(k))
    return network


@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
def test_a_fresh_model_takes_all_sets_from_a_checkpoint(assign):
    old, new = trained(model()), model()
    saved = copy.deepcopy(old.state_dict())
    new.load_state_dict(saved, strict=True, assign=assign)
    assert list(new.state_dict()) == list(saved)
    trained(old)
    trained(new)
    assert_close(new.state_dict(), old.state_dict(), rtol=0, atol=0)
    for name in ("clean", "noisy", None):
        with bn.domain(name):
            assert_close(new.eval()(batch(3)), old.eval()(batch(3)), rtol=0, atol=0)


def test_a_model_on_meta_takes_all_sets_from_a_checkpoint():
    old = trained(model())
    with torch.device("meta"):
        new = model()
    new.load_state_dict(old.state_dict(), assign=True)
    with bn.domain("noisy"):
        assert_close(new.eval()(batch(3)), old.eval()(batch(3)), rtol=0, atol=0)


def test_a_checkpoint_without_a_set_that_the_layer_has_is_strict_about_it():
    layer = visited("a")
    missing = bn.BatchNorm1d(3).state_dict()
    with pytest.raises(RuntimeError, match=r"domains\.a\.running_mean"):
        layer.load_state_dict(missing)
    assert layer.load_state_dict(missing, strict=False).missing_keys == [f"domains.a.{k}" for k in STATISTICS]


def test_a_checkpoint_without_sets_moves_both_ways():
    ours, theirs = visited(None, None), nn.BatchNorm1d(3)
    theirs.load_state_dict(ours.state_dict())
    assert_close(theirs.eval()(batch(2)), copy.deepcopy(ours).eval()(batch(2)))
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == OWN


def test_saved_as_weights_only():
    file = io.BytesIO()
    old, new = trained(model()), model()
    torch.save(old.state_dict(), file)
    file.seek(0)
    new.load_state_dict(torch.load(file, weights_only=True))
    assert_close(new.state_dict(), old.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_a_copy_has_sets_of_its_own(copied):
    old = trained(model())
    before = copy.deepcopy(old.state_dict())
    new = copied(old)
    assert_close(new.state_dict(), before, rtol=0, atol=0)
    trained(new)
    assert_close(old.state_dict(), before, rtol=0, atol=0)
    assert new[2].domains["clean"].num_batches_tracked == 8


def test_half_types_leave_statistics_wide():
    layer = visited("a", "b").bfloat16()
    with bn.domain("later"):
        layer(batch(1).bfloat16())
    assert layer.weight.dtype == torch.bfloat16 and widths(layer) == {torch.float32}
    narrow = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in layer.state_dict().items()}
    layer.load_state_dict(narrow, assign=True)
    assert widths(layer) == {torch.float32}
    assert widths(layer.double()) == {torch.float64}


def widths(layer):
    return {value.dtype for name, value in layer.named_buffers() if "running" in name}


def test_sets_move_with_their_layer():
    layer = visited("a").to("meta")
    assert all(value.is_meta for value in layer.state_dict().values())
    with bn.domain("b"):
        layer(batch(0).to("meta"))
    layer.to_empty(device="cpu").reset_running_stats()
    for name in ("a", "b", None):
        assert_close(kept(layer, name), kept(bn.BatchNorm1d(3)), rtol=0, atol=0)


def test_reset_resets_every_set():
    layer = visited(None, "a", "b")
    layer.reset_running_stats()
    for name in ("a", "b", None):
        assert_close(kept(layer, name), kept(nn.BatchNorm1d(3)), rtol=0, atol=0)


def test_functional_call_takes_a_sets_buffers_by_name():
    layer = visited("a").eval()
    mean, var = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    given = {"domains.a.running_mean": mean, "domains.a.running_var": var}
    x = batch(1)
    with bn.domain("a"):
        found = functional_call(layer, given, (x,))
        own = layer(x)
    assert_close(found, (x - mean) / (var + layer.eps).sqrt())
    assert not torch.allclose(found, own)


def test_functional_call_moves_what_it_was_given():
    layer = visited("a")
    before = copy.deepcopy(layer.state_dict())
    given = {f"domains.a.{name}": value.clone() for name, value in kept(layer, "a").items()}
    with bn.domain("a"):
        functional_call(layer, given, (batch(1),))
        assert_close(layer.state_dict(), before, rtol=0, atol=0)
        layer(batch(1))
    assert_close({name.rpartition(".")[2]: value for name, value in given.items()}, kept(layer, "a"))


def test_the_cumulative_and_the_debiased_average_count_by_set():
    for options in ({"momentum": None}, {"momentum": 0.2, "debiased": True}):
        layer = bn.BatchNorm1d(3, **options)
        for k, name in enumerate(["a", "a", "a", "b"]):
            with bn.domain(name):
                layer(batch(k))
        assert_close(kept(layer, "b")["running_mean"], batch(3).mean(0))  # its first
        weights = torch.tensor([1.0, 1, 1] if options["momentum"] is None else [0.64, 0.8, 1])
        means = torch.stack([batch(k).mean(0) for k in range(3)])
        assert_close(kept(layer, "a")["running_mean"], weights @ means / weights.sum())


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("during", [True, False], ids=["backward inside", "backward outside"])
def test_recomputing_activations_does_not_count(reentrant, during):
    layer, x = bn.BatchNorm1d(3), batch(0).requires_grad_()
    with bn.domain("a"):
        loss = checkpoint(layer, x, use_reentrant=reentrant).sin().sum()
    with bn.domain("a") if during else nullcontext():
        loss.backward()
    plain = nn.BatchNorm1d(3)
    y = batch(0).requires_grad_()
    plain(y).sin().sum().backward()
    assert_close(kept(layer, "a"), kept(plain))
    assert kept(layer)["num_batches_tracked"] == 0
    assert_close(x.grad, y.grad)


def test_one_value_takes_the_statistics_of_its_domain():
    layer = bn.BatchNorm1d(3, on_single="running")
    with bn.domain("a"):
        layer(batch(1))
        single = layer(batch(5)[:1])
        assert_close(single, layer.eval()(batch(5)[:1]))
    assert kept(layer, "a")["num_batches_tracked"] == 1


def test_a_call_that_fails_moves_no_set():
    layer = visited("a")
    before = copy.deepcopy(layer.state_dict())
    with bn.domain("a"), pytest.raises(ValueError, match="residual"):
        layer(batch(1), batch(1)[:2])
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_every_activation_of_its_own():
    layer = bn.BatchNorm2d((3, 2, 2), dtype=torch.float64)
    flat = nn.BatchNorm1d(12, dtype=torch.float64)
    x = batch(1, (6, 3, 2, 2), dtype=torch.float64)
    with bn.domain("a"):
        layer(x)
        flat(x.flatten(1))
        assert_close(layer.eval()(x).flatten(1), flat.eval()(x.flatten(1)))
    assert layer.domains["a"].running_mean.shape == (3, 2, 2)


@pytest.mark.slow
def test_a_compiled_layer_changes_domains():
    layer = visited("a", "b", None)
    eager = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for k, name in enumerate(["a", "b", None, "a", "b", None]):
        with bn.domain(name):
            assert_close(compiled(batch(k)), eager(batch(k)))
    assert_close(layer.state_dict(), eager.state_dict())
    torch._dynamo.reset()


def test_a_batch_that_fails_makes_no_set():
    layer = bn.BatchNorm1d(3)
    with bn.domain("new"), pytest.raises(ValueError, match="more than 1 value"):
        layer(torch.randn(1, 3))
    with bn.domain("new"), pytest.raises(RuntimeError, match=r"domain 'new' \(there are: none\)"):
        layer.eval()(torch.randn(4, 3))


def test_one_value_has_nothing_to_take_in_a_new_domain():
    layer = bn.BatchNorm1d(3, on_single="running")
    with bn.domain("new"), pytest.raises(ValueError, match="more than 1 value"):
        layer(torch.randn(1, 3))
    layer(torch.randn(1, 3))


def test_a_frozen_layer_has_nothing_to_take_in_a_new_domain():
    layer = bn.BatchNorm1d(3, statistics=bn.Population())
    with bn.domain("new"), pytest.raises(RuntimeError, match="domain 'new'"):
        layer(torch.randn(4, 3))


MUTATIONS = [
    Mutation(
        "an inner domain forgets the outer", "running/domain.py",
        "        _active = before", "        _active = None",
        "contexts nest",
    ),
    Mutation(
        "a set of every domain left as it was", "running/tracking.py",
        "            statistics.reset()\n", "            pass\n",
        "reset_running_stats is for all of them",
    ),
]  # fmt: skip
