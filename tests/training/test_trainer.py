"""The trainer in this process: what a step computes, what it looks at, and that it goes on bit for bit."""

import copy
import itertools
import math
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from batchnorm.records import Evaluation, Result
from batchnorm.statistics.sync import Sync
from batchnorm.training import checkpoint, toml
from batchnorm.training.checkpoint import CheckpointError
from batchnorm.training.config import Config
from batchnorm.training.network import NetworkError
from batchnorm.training.score import Score
from batchnorm.training.toml import ConfigError
from batchnorm.training.trainer import Trainer
from tests.data.pictures import image_folder
from tests.mutations.mutation import Mutation
from tests.training.tiny import TINY, same


@pytest.fixture(autouse=True)
def _precision_may_change():
    """Accelerate holds a process to one precision, and these tests take turns."""
    AcceleratorState._reset_state(True)


def config(*changes: str) -> Config:
    return toml.parse(TINY, changes)


def trainer(*changes: str) -> Trainer:
    return Trainer(config(*changes), "job")


def records(each: Trainer) -> list[Evaluation | Result]:
    return [record for record in each.run() if record is not None]


def steps(each: Trainer, number: int) -> Trainer:
    """After so many steps; none of them may be one that is evaluated."""
    for _ in itertools.islice(each.run(), number):
        pass
    assert each.step == number
    return each


def learn(each: Trainer) -> None:
    """One step on the first batch."""
    each._train_step(next(each.loader.batches([0])))
    each.step += 1


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def without_time(each: Iterable[Evaluation | Result]) -> list[str]:
    return [record.model_dump_json(exclude={"seconds"}) for record in each]


RICH = (
    "model.dropout=0.3",
    "data.distortion=full",
    "training.ema=0.9",
    "training.micro_batch=3",
    "training.patience=9",
    "optimizer.decay_every=4",
    "optimizer.decay=0.5",
)


@pytest.mark.slow
def test_a_seed_gives_the_same_run_and_another_seed_another():
    ends = []
    for seed in (1, 1, 2):
        each = trainer(*RICH, "training.steps=3", f"training.seed={seed}")
        ends.append((without_time(records(each)), weights(each.network)))
    assert same(ends[0], ends[1])
    assert ends[0][0] != ends[2][0]


@pytest.fixture(scope="module")
def whole():
    changes = (*RICH, "evaluation.batch_size=20")
    each = trainer(*changes)
    return changes, without_time(records(each)), timeless(each.state_dict())


def timeless(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in ("seconds", "result")}


# moments between the yields of the run: after a step, in the middle of either evaluation, at the very end
@pytest.mark.slow
@pytest.mark.parametrize("moment", [2, 5, 8, 18])
def test_continues_from_any_moment_bit_for_bit(tmp_path, whole, moment):
    changes, expected, end = whole
    first = trainer(*changes)
    before = [record for record in itertools.islice(first.run(), moment) if record is not None]
    checkpoint.save(first.state_dict(), tmp_path / "step.pt")
    torch.rand(7)  # whatever else happens in the process
    torch.manual_seed(5)
    second = trainer(*changes)
    state = checkpoint.load(tmp_path / "step.pt")
    assert state is not None
    second.load_state_dict(state)
    assert without_time(second.evaluations) == without_time(before)
    after = records(second)
    assert without_time(before) + without_time(after) == expected
    assert same(timeless(second.state_dict()), end)


@pytest.mark.slow
def test_loaders_change_no_bit():
    """Of which a training that goes on from one without them is the proof."""
    changes = (*RICH, "training.steps=99", "evaluation.every=99")
    whole = steps(trainer(*changes), 3)
    state = steps(trainer(*changes), 1).state_dict()
    loaded = trainer(*changes, "machine.loaders=1")
    loaded.load_state_dict(state)
    for _ in itertools.islice(loaded.run(), 2):
        pass
    assert same(timeless(loaded.state_dict())["model"], whole.network.state_dict())


@pytest.mark.slow
def test_the_moments_above_are_in_training_in_evaluations_and_at_the_end():
    each = trainer(*RICH, "evaluation.batch_size=20")
    kinds = [
        ("step" if each.step % 3 else "part") if record is None else type(record).__name__
        for record in each.run()
    ]
    parts = ["part"] * 5  # one is the step, two are the halves of the validation set for each of two networks
    assert kinds == ["step", "step", *parts, "Evaluation"] * 2 + ["part"] * 2 + ["Result"]


@pytest.mark.slow
def test_a_completed_run_that_is_continued_says_its_result_again():
    whole = trainer()
    *_, result = records(whole)
    again = trainer()
    again.load_state_dict(whole.state_dict())
    assert records(again) == [result]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [("training.seed=3",), ("model.width=0.1",), ("optimizer.rate=0.04",), ("evaluation.every=2",)],
)
def test_the_state_of_another_run_is_refused(changes):
    state = trainer().state_dict()
    with pytest.raises(CheckpointError, match="other settings"):
        trainer(*changes).load_state_dict(state)


def test_the_machine_and_the_checkpoints_may_be_others():
    state = trainer().state_dict()
    trainer("machine.channels_last=false", "checkpoints.keep=9").load_state_dict(state)


@pytest.mark.slow
def test_what_is_no_state_of_a_trainer_is_refused():
    whole = trainer().state_dict()
    for broken in (
        {},
        {"config": 3},
        {"config": whole["config"]},
        {**whole, "optimizer": {}},
        {**whole, "random": 7},
        {**whole, "model": {name: value[:0] for name, value in whole["model"].items() if value.dim()}},
        trainer().network.state_dict(),
    ):
        with pytest.raises(CheckpointError):
            trainer().load_state_dict(broken)


def algorithm_2(each: Trainer, network: nn.Module) -> nn.Module:
    """The inference network of Algorithm 2, from what every BN layer is handed; each layer's inputs at once."""
    network = copy.deepcopy(network).train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    epoch = each.order.batches_per_epoch
    wanted = each.config.evaluation.population_batches
    batches = list(each.loader.batches([number * epoch // wanted for number in range(wanted)]))
    inputs: dict[str, list[torch.Tensor]] = {}
    norms = {name: module for name, module in network.named_modules() if hasattr(module, "running_mean")}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for batch in batches:
            network(batch.images.double())
    for name, norm in norms.items():
        moments = [torch.var_mean(x, (0, 2, 3)) for x in inputs[name]]  # unbiased, as line 10 asks
        norm.running_var, norm.running_mean = (
            torch.stack(each).mean(0) for each in zip(*moments, strict=True)
        )
        norm._forward_pre_hooks.clear()
    return network.eval()


def accuracy(each: Trainer, network: nn.Module) -> float:
    score = Score()
    with torch.no_grad():
        for batch in each.validation:
            score += Score.of(network(batch.images.double()), batch.labels)
    return score.accuracy


@pytest.mark.slow
@pytest.mark.parametrize("micro", [8, 3])
def test_accuracies_are_those_of_algorithm_2_of_the_moving_averages_and_of_the_averaged_weights(micro):
    each = trainer(
        "training.precision=float64",
        "training.ema=0.8",
        "training.steps=9",
        f"training.micro_batch={micro}",  # the statistics are the whole batch's all the same
        "evaluation.every=9",
        "model.dropout=0.4",
        "evaluation.images=400",
        "evaluation.population_batches=3",
    )
    *_, evaluation, result = records(each)
    expected = algorithm_2(each, each.network)
    assert each.inference is not None
    found = each.inference.state_dict()
    for name, value in expected.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    assert isinstance(evaluation, Evaluation) and isinstance(result, Result)
    assert each.average is not None
    assert evaluation.accuracy == result.accuracy == accuracy(each, expected)
    assert evaluation.accuracy_average == accuracy(each, algorithm_2(each, each.average.module))
    assert result.accuracy_moving == accuracy(each, copy.deepcopy(each.network).eval())
    assert len({evaluation.accuracy, evaluation.accuracy_average, result.accuracy_moving}) == 3


@pytest.mark.slow
def test_evaluating_changes_nothing_of_the_training():
    ends = []
    for every in (1, 3):
        each = trainer(*RICH, "training.steps=3", f"evaluation.every={every}")
        records(each)
        ends.append(weights(each.network))
    assert same(*ends)


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_micro_batches_are_one_batch(micro):
    changes = ("training.precision=float64", "optimizer.weight_decay=0")
    whole, parts = trainer(*changes), trainer(*changes, f"training.micro_batch={micro}")
    sizes: list[int] = []
    parts.network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for each in (whole, parts):
        learn(each)
    assert max(sizes) <= micro
    torch.testing.assert_close(float(parts.loss_sum), float(whole.loss_sum), rtol=1e-12, atol=0)
    gradients = {name: p.grad for name, p in parts.network.named_parameters()}
    for name, parameter in whole.network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)
    for (name, one), other in zip(
        whole.network.state_dict().items(), parts.network.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12, msg=name)


def test_the_averaged_weights_are_an_exponential_average_of_every_step_s():
    each = trainer("training.ema=0.75", "training.precision=float64")
    expected: dict[str, torch.Tensor] = {}
    batches = each.loader.batches(itertools.count())
    for _ in range(4):
        each._train_step(next(batches))
        for name, parameter in each.network.named_parameters():
            now = parameter.detach().clone()
            expected[name] = 0.75 * expected[name] + 0.25 * now if name in expected else now
    assert each.average is not None
    for name, parameter in each.average.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("changes", [(), ("model.batch_norm=false",)])
def test_weight_decay_is_on_the_weights_of_convolutions_and_linear_layers_only(changes):
    each = trainer("optimizer.weight_decay=0.5", "optimizer.rate=0.1", "optimizer.momentum=0", *changes)
    for parameter in each.network.parameters():
        torch.nn.init.normal_(parameter, 1.0)
        parameter.grad = torch.zeros_like(parameter)
    before = weights(each.network)
    each.optimizer.step()
    decayed = {
        f"{name}.weight"
        for name, module in each.network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    assert len(decayed) > 50
    for name, parameter in each.network.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if name in decayed else before[name]
        torch.testing.assert_close(parameter.detach(), expected)


def test_the_rate_decays_in_steps_and_momentum_carries_on():
    each = trainer("optimizer.decay_every=2", "optimizer.decay=0.5", "optimizer.rate=0.2")
    rates = []
    inner: torch.optim.Optimizer = each.optimizer.optimizer  # type: ignore[attr-defined]  # Accelerate wraps it
    inner.register_step_pre_hook(
        lambda optimizer, *_: rates.append({group["lr"] for group in optimizer.param_groups})
    )
    records(each)
    assert rates == [{0.2 * 0.5 ** (step // 2)} for step in range(6)]
    assert {group["momentum"] for group in each.optimizer.param_groups} == {0.9}


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_the_auxiliary_head_s_loss_is_added_with_its_weight(precision):
    each = trainer(
        "model.auxiliary=true",
        "data.image_size=20",
        "training.auxiliary_weight=0.25",
        f"training.precision={precision}",
    )
    network = copy.deepcopy(each.network).train()
    images, labels = each._to_device(next(each.loader.batches([0])))
    with torch.no_grad():
        outputs = network(images)
    entropy = nn.functional.cross_entropy
    expected = entropy(outputs.logits, labels) + 0.25 * entropy(outputs.auxiliary, labels)
    learn(each)
    assert float(each.loss_sum) == pytest.approx(
        float(expected), rel=1e-9 if precision == "float64" else 1e-2
    )
    gradient = each.network.get_submodule("auxiliary")[-1].weight.grad
    assert isinstance(gradient, torch.Tensor) and gradient.abs().sum() > 0


@pytest.mark.slow
def test_bfloat16_is_near_float32_and_not_the_same():
    losses = {}
    for precision in ("float32", "bfloat16"):
        AcceleratorState._reset_state(True)
        # of one step: what later ones make of the rounding depends on the processor
        each = trainer(f"training.precision={precision}", "training.steps=1", "evaluation.every=1")
        kinds: list[torch.dtype] = []
        each.network.get_submodule("stem.second.convolution").register_forward_hook(
            lambda *args, kinds=kinds: kinds.append(args[2].dtype)
        )
        *_, result = records(each)
        assert isinstance(result, Result)
        losses[precision] = result.loss
        assert set(kinds) == {getattr(torch, precision)}
        assert next(each.network.parameters()).dtype == torch.float32
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


def test_float16_on_a_cpu_is_an_error():
    with pytest.raises(NetworkError, match="bfloat16"):
        trainer("training.precision=float16")


@pytest.mark.parametrize("more", [[], ["training.ema=0.9"], ["training.precision=bfloat16"]])
def test_saved_memory_changes_no_number(more):
    plain, saving = trainer(*more), trainer(*more, "machine.save_memory=true")
    hooks = saving.network._forward_pre_hooks
    assert hooks and not plain.network._forward_pre_hooks
    losses = [[each.loss for each in records(one)] for one in (plain, saving)]
    assert losses[0] == losses[1]
    assert same(plain.network.state_dict(), saving.network.state_dict())


def test_channels_last_and_kept_memory_are_on_unless_switched_off(monkeypatch):
    kept: list[bool] = []
    monkeypatch.setattr("batchnorm.training.trainer.keep_memory", lambda: kept.append(True))
    bare = {name: part for name, part in TINY.items() if name != "machine"}
    each = Trainer(toml.parse(bare, ["machine.device=cpu"]), "job")
    assert kept == [True]
    layouts = []
    convolution = each.network.get_submodule("stem.second.convolution")
    convolution.register_forward_pre_hook(
        lambda _, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    learn(each)
    assert layouts == [True]
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    off = trainer("machine.channels_last=false")
    assert kept == [True]
    assert off.network.get_submodule("stem.second.convolution").weight.is_contiguous()


@pytest.mark.slow
def test_sync_gives_every_layer_the_statistics_of_all_processes():
    each, alone = trainer("training.sync=true"), trainer()
    for network, kind in ((each.network, Sync), (alone.network, type(None))):
        found = {type(module.statistics) for module in network.modules() if hasattr(module, "statistics")}
        assert found == {kind}
    learn(each)
    learn(alone)  # of one process all is its own
    for name, value in weights(alone.network).items():
        torch.testing.assert_close(each.network.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_evaluations_come_when_they_are_asked_for():
    at = [
        record.step
        for record in records(trainer("evaluation.every=2", "evaluation.first=3"))
        if record.kind == "evaluation"
    ]
    assert at == [4, 6]
    unless_given = {name: part for name, part in TINY.items() if name != "evaluation"}
    each = Trainer(
        toml.parse(unless_given, ["training.steps=25", "evaluation.apart=0.1", "evaluation.first=1"]), "job"
    )
    assert sorted(set(each._evaluation_steps())) == [10, 20, 25]


@pytest.mark.slow
def test_patience_ends_a_run_after_so_many_evaluations_without_a_new_best(monkeypatch):
    each = trainer("training.steps=60", "evaluation.every=1", "training.patience=2")
    accuracies = iter([0.1, 0.3, 0.3, 0.4, 0.2, 0.4, 0.9])

    def score(_: nn.Module):
        yield None
        return Score(10, round(10 * next(accuracies)), 10)

    monkeypatch.setattr(each, "_evaluate_accuracy", score)
    *_, result = records(each)
    assert isinstance(result, Result)
    assert result.steps == 6
    assert not result.diverged


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*saw a batch whose mean or variance is inf or nan")
def test_a_loss_that_is_no_number_ends_the_run_and_is_never_sound():
    each = trainer("optimizer.rate=1e30", "training.steps=500", "evaluation.every=200")
    assert each.is_finite
    *evaluations, result = records(each)
    assert isinstance(result, Result)
    assert result.diverged
    assert result.steps == 50  # the loss is looked at now and then, as it costs a wait
    assert not math.isfinite(result.loss)
    assert [evaluation.kind for evaluation in evaluations] == ["evaluation"]
    assert not each.is_finite


@pytest.mark.parametrize("broken", ["weight", "loss", "diverged"])
def test_a_state_with_a_number_lost_is_not_sound(broken):
    each = trainer()
    assert each.is_finite
    if broken == "weight":
        with torch.no_grad():
            next(each.network.parameters()).view(-1)[0] = math.nan
    elif broken == "loss":
        each.loss_sum.fill_(math.inf)
    else:
        each.diverged = True
    assert not each.is_finite


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_a_model_of_torchvision_trains_on_a_folder_of_images(tmp_path, name):
    image_folder(tmp_path)
    values = {**TINY, "model": {"name": name}, "data": {"source": str(tmp_path), "image_size": 32}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's own, of how googlenet is initialised
        each = Trainer(toml.parse(values, ["training.steps=2"]), "job")
    before = weights(each.network)
    *_, result = records(each)
    assert isinstance(result, Result)
    assert math.isfinite(result.loss)
    assert (
        each.network.state_dict()["conv1.weight" if name == "resnet18" else "conv1.conv.weight"].shape[1] == 3
    )
    assert not same(before, weights(each.network))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["model.name=resnet18"], "3 channels"),
        (["model.name=resnet18", "data.source=FOLDER", "model.dropout=0.5"], "dropout"),
        (["model.name=resnet81", "data.source=FOLDER"], "resnet81"),
    ],
)
def test_a_model_that_cannot_be_built_says_why(tmp_path, changes, says):
    values = {**TINY, "model": {}}
    folder = image_folder(tmp_path)
    changes = [change.replace("FOLDER", str(folder)) for change in changes]
    with pytest.raises(NetworkError, match=says):
        Trainer(toml.parse(values, changes), "job")


def test_a_batch_that_does_not_divide_among_the_processes_says_so(monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 3))
    with pytest.raises(ConfigError, match=r"training\.batch_size.* 8 does not divide among 3"):
        trainer()


# the words are those of test_toml.py; here, that the key that was meant is named
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["optimizer.rat=1"], r"optimizer\.rat.*did you mean rate"),
        (["optimiser.rate=1"], r"optimiser.*did you mean optimizer"),
        (["model.widht=1"], r"model\.widht.*did you mean width"),
        (["data.shuffle=shard"], r"data\.shuffle.*shard.*'shards' or 'within-shards'"),
        (["model.stem=smal"], r"model\.stem.*'small'"),
        (["optimizer.rate=-1"], r"optimizer\.rate = -1.*greater than 0"),
        (["training.steps=2.5"], r"training\.steps = 2\.5.*integer"),
        (["rate=1"], r"section\.key=value"),
        (["optimizer.rat=1", "model.widht=1"], r"(?=.*mean rate)(?=.*mean width)"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said_by_its_key(changes, says):
    with pytest.raises(ConfigError, match=says) as error:
        config(*changes)
    assert "\n" not in str(error.value)


def test_set_changes_keys_and_leaves_the_rest():
    changed = config(
        "optimizer.rate=0.7", "data.source=cifar-10", 'model.per_activation=["5a"]', "training.sync=true"
    )
    assert (changed.optimizer.rate, changed.data.source, changed.training.sync) == (0.7, "cifar-10", True)
    assert changed.model.per_activation == ("5a",)  # type: ignore[union-attr]
    assert toml.differences(config(), changed) == [
        "model.per_activation",
        "data.source",
        "optimizer.rate",
        "training.sync",
    ]
    assert toml.differences(config(), config("machine.threads=2", "checkpoints.keep=1")) == []


MUTATIONS = [
    Mutation(
        "dropout's generator forgotten", "training/trainer.py",
        '            self._set_random_states(random[rank])', '            pass',
        "a continued run drops other units",
    ),
    Mutation(
        "momentum forgotten", "training/trainer.py",
        '        self.optimizer.load_state_dict(state["optimizer"])\n', '',
        "SGD would start from rest",
    ),
    Mutation(
        "patience off by one", "training/trainer.py",
        "_argmax(accuracies) >= patience", "_argmax(accuracies) > patience",
        "so many evaluations, and no more",
    ),
]  # fmt: skip
