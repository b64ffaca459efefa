"""The training loop: where it looks, what it samples, what it records, and that it continues bit for bit."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from batchnorm.data.digits import Digits
from batchnorm.data.idx import DataError
from batchnorm.records import Evaluation, Result
from batchnorm.training import checkpoint
from batchnorm.training.checkpoint import CheckpointError
from batchnorm.training.digits_trainer import POPULATION_BATCHES, DigitsTrainer, Training
from batchnorm.training.schedule import evaluation_steps

DATA = Digits.load()


def config(**values: object) -> Training:
    return Training.model_validate({"batch_norm": True, "rate": 0.1, "steps": 40, "seed": 1} | values)


def run(trainer: DigitsTrainer) -> list[Evaluation | Result]:
    return [record for record in trainer.run() if record is not None]


def without_time(records: list[Evaluation | Result]) -> list[str]:
    return [record.model_dump_json(exclude={"seconds"}) for record in records]


@pytest.mark.parametrize("steps", [1, 9, 10, 11, 999, 50_000])
def test_evaluations_are_at_most_ten_per_cent_apart_and_end_at_the_end(steps):
    at = list(evaluation_steps(steps))
    assert at == sorted(set(at))
    assert at[-1] == steps
    assert all(later - earlier <= max(10, earlier / 10) for earlier, later in itertools.pairwise(at))
    assert len(at) < 120


def test_an_epoch_is_every_sample_once_in_full_batches_and_the_next_is_another_order():
    trainers = [DigitsTrainer(config(batch_norm=bn), DATA, "job") for bn in (True, False)]
    number = torch.arange(8000)
    seen = []
    for step in range(2 * 133):
        for trainer in trainers:
            trainer.step, trainer.labels = step, number
        batches = [trainer._batch()[1] for trainer in trainers]
        assert torch.equal(*batches)  # both networks see the same batches
        assert len(batches[0]) == 60
        seen.append(batches[0])
    first, second = torch.cat(seen[:133]), torch.cat(seen[133:])
    assert len(first.unique()) == len(second.unique()) == 133 * 60
    assert not torch.equal(first, second)


def test_images_are_binary():
    assert DigitsTrainer(config(), DATA, "job").images.unique().tolist() == [0.0, 1.0]


@pytest.mark.slow
def test_a_seed_gives_the_same_record_and_another_seed_another():
    records = [without_time(run(DigitsTrainer(config(seed=seed), DATA, "job"))) for seed in (1, 1, 2)]
    assert records[0] == records[1]
    assert records[0] != records[2]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 17, 20, 39, 40])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_continues_from_any_step_to_the_same_numbers(tmp_path, stop, batch_norm):
    settings = config(batch_norm=batch_norm, dropout=0.3, watch=True)
    whole = run(DigitsTrainer(settings, DATA, "job"))
    first = DigitsTrainer(settings, DATA, "job")
    steps = first.run()
    for _ in range(stop):
        next(steps)
    checkpoint.save(first.state_dict(), tmp_path / "job.pt")
    torch.rand(7)  # whatever else happens in the process
    second = DigitsTrainer(settings, DATA, "job")
    state = checkpoint.load(tmp_path / "job.pt")
    assert state is not None
    second.load_state_dict(state)
    replayed = without_time([*second.evaluations])
    assert replayed + without_time(run(second)) == without_time(whole)


def test_a_checkpoint_of_other_settings_is_refused():
    state = DigitsTrainer(config(), DATA, "job").state_dict()
    with pytest.raises(CheckpointError, match="other settings"):
        DigitsTrainer(config(rate=0.2), DATA, "job").load_state_dict(state)


def test_a_torn_checkpoint_says_what_to_do(tmp_path):
    path = tmp_path / "job.pt"
    checkpoint.save(DigitsTrainer(config(), DATA, "job").state_dict(), path)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="delete it"):
            checkpoint.load(path)


def test_saving_replaces_the_checkpoint_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "job.pt"
    checkpoint.save({"step": 1}, path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save({"step": 2}, path)
    monkeypatch.undo()
    assert checkpoint.load(path) == {"step": 1}


def test_inference_uses_the_statistics_of_algorithm_2():
    trainer = DigitsTrainer(config(steps=30), DATA, "job")
    run(trainer)
    inference = trainer._inference_model()
    before = copy.deepcopy(trainer.model.state_dict())
    first = next(m for m in trainer.model.modules() if isinstance(m, nn.Linear))
    batches = [trainer.images[chosen] for chosen in trainer._population]
    assert len(batches) == POPULATION_BATCHES
    assert all(len(batch) == 60 for batch in batches)
    labels = trainer.labels[torch.cat(trainer._population)]
    assert len(labels.unique()) == 10  # drawn at random: the files may be sorted by class
    assert not torch.equal(torch.cat(trainer._population), torch.arange(len(labels)))
    u = [first(batch).detach().double() for batch in batches]
    norm = next(m for m in inference.modules() if isinstance(m, nn.BatchNorm1d))
    mean = torch.stack([x.mean(0) for x in u]).mean(0)
    unbiased = torch.stack([x.var(0, unbiased=True) for x in u]).mean(0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), unbiased, rtol=1e-5, atol=1e-6)
    assert not inference.training
    assert trainer.model.training
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name  # measuring leaves the network as it was


def test_evaluations_report_both_kinds_of_statistics_and_the_percentiles():
    trainer = DigitsTrainer(config(steps=30, watch=True), DATA, "job")
    *_, evaluation, result = run(trainer)
    assert isinstance(evaluation, Evaluation)
    inputs: list[torch.Tensor] = []
    inference = trainer._inference_model()
    inference.last_nonlinearity.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        right = (inference(trainer.test_images).argmax(1) == trainer.test_labels).sum().item()
        moving = trainer.model.eval()(trainer.test_images).argmax(1).eq(trainer.test_labels).sum().item()
    assert evaluation.accuracy == right / 2000
    assert evaluation.accuracy_moving == moving / 2000
    assert right != moving  # after 30 steps the moving averages lag behind
    expected = [inputs[0][:, 0].quantile(q).item() for q in (0.15, 0.5, 0.85)]
    assert evaluation.percentiles == pytest.approx(expected)
    assert isinstance(result, Result)
    assert result.accuracy == evaluation.accuracy


def test_travel_is_the_path_of_the_median_in_widths():
    trainer = DigitsTrainer(config(steps=30, watch=True), DATA, "job")
    *_, evaluation, _ = run(trainer)
    assert isinstance(evaluation, Evaluation)
    medians = [w[1].tolist() for w in trainer.watched]
    widths = [(w[2] - w[0]).tolist() for w in trainer.watched]
    units = []
    for unit in range(100):
        path = sum(abs(b[unit] - a[unit]) for a, b in itertools.pairwise(medians))
        units.append(path / (sum(w[unit] for w in widths) / len(widths)))
    assert evaluation.travel == pytest.approx(sum(units) / 100, rel=1e-5)
    assert sum(units) > 0


def test_divergence_ends_the_run_and_is_recorded():
    *evaluations, result = run(
        DigitsTrainer(config(batch_norm=False, nonlinearity="relu", rate=1e6), DATA, "job")
    )
    assert isinstance(result, Result)
    assert result.diverged
    assert result.steps == 10 < 40
    assert not math.isfinite(evaluations[-1].loss)


def test_too_few_images_for_a_batch_is_an_error():
    few = Digits(DATA.train_images[:59], DATA.train_labels[:59], DATA.test_images, DATA.test_labels)
    with pytest.raises(DataError, match="59 training images"):
        DigitsTrainer(config(), few, "job")
