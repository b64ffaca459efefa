"""Predictions: a small network that was trained here, asked about digits in one crop and in 144."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from batchnorm.data.crops import multi_crop, single_crop
from batchnorm.data.digits import Digits
from batchnorm.records import Evaluation, Result
from batchnorm.training import checkpoint, toml
from batchnorm.training.checkpoint import CheckpointError
from batchnorm.training.evaluation import Crops, Predictions
from batchnorm.training.prediction import Prediction, Predictor, load_predictions
from batchnorm.training.trainer import Trainer

SIZE, IMAGES = 16, 3
CONFIG = toml.parse(
    {
        "model": {"width": 0.05, "stem": "small", "dropout": 0.0},
        "data": {"image_size": SIZE, "distortion": "none"},
        "optimizer": {"rate": 0.05},
        "training": {"steps": 12, "batch_size": 16},
        "evaluation": {"images": 20, "population_batches": 2},
        "machine": {"device": "cpu", "threads": 1, "keep_memory": False},
    },
    (),
)
ASKED = Prediction(network="member-1", config=CONFIG, images=IMAGES)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("predictions of one network")]


@pytest.fixture(autouse=True)
def _precision_may_change():
    """Accelerate holds a process to one precision, and other tests use others."""
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder with the checkpoint, as a worker leaves it, and the network by either kind of statistics."""
    AcceleratorState._reset_state(True)
    folder = tmp_path_factory.mktemp("checkpoints")
    trainer = Trainer(CONFIG, "member-1")
    *_, last = trainer.run()
    assert isinstance(last, Result)
    checkpoint.save(trainer.state_dict(), folder / "member-1.pt")
    return folder, {"population": trainer.inference_network(), "moving": trainer.network.eval()}


@pytest.fixture(scope="module")
def whole(trained):
    """A prediction that nobody stopped, and all that it yielded."""
    predictor = Predictor(ASKED, "prediction", trained[0])
    return predictor, list(predictor.run())


def asked_about() -> tuple[Tensor, Tensor]:
    """Validation images, (3, 1, 28, 28), chosen as `Subset` says, and their classes."""
    digits = Digits.load("mnist-10k")
    chosen = torch.randperm(len(digits.test_labels), generator=torch.Generator().manual_seed(0))[:IMAGES]
    return digits.test_images[chosen].unsqueeze(1), digits.test_labels[chosen].long()


def test_the_probabilities_are_means_over_the_crops_by_population_statistics(trained, whole):
    network, said = trained[1]["population"], whole[0].predictions
    images, labels = asked_about()
    assert torch.equal(said[1].labels, labels)
    assert torch.equal(said[144].labels, labels)
    with torch.no_grad():
        for image, single, multi in zip(images, said[1].probabilities, said[144].probabilities, strict=True):
            one = torch.softmax(network(single_crop(SIZE)(image)[None])[0].double(), 0)
            torch.testing.assert_close(single.double(), one, rtol=1e-4, atol=1e-6)
            crops = multi_crop(SIZE)(image)
            assert len(crops) == 144
            many = torch.softmax(network(crops).double(), 1).sum(0) / 144
            torch.testing.assert_close(multi.double(), many, rtol=1e-4, atol=1e-6)
            assert not torch.allclose(single, multi, rtol=1e-2)
    with torch.no_grad():  # by moving averages it says something else
        other = trained[1]["moving"](single_crop(SIZE)(images[0])[None]).softmax(1)[0]
    assert not torch.allclose(other, said[1].probabilities[0], rtol=1e-2)


def test_the_records_say_how_many_were_right_by_144_crops(whole):
    predictor, yielded = whole
    *steps, evaluation, result = yielded
    assert steps == [None] * (1 + IMAGES)  # all of them by one crop, then each by 144
    multi, labels = predictor.predictions[144].probabilities, predictor.predictions[144].labels
    right = (multi.argmax(1) == labels).sum().item()
    likelihood = multi[range(IMAGES), labels]
    assert isinstance(evaluation, Evaluation)
    assert isinstance(result, Result)
    for record in (evaluation, result):
        assert record.job == "prediction"
        assert record.accuracy == right / IMAGES
        assert record.loss == pytest.approx(-likelihood.log().mean().item())
    assert evaluation.step == result.steps == IMAGES
    assert not result.diverged
    assert Prediction.model_validate(result.config) == ASKED


@pytest.mark.parametrize("yields", range(1, 2 + IMAGES + 1))
def test_stopped_anywhere_it_goes_on_to_the_same_tensors(trained, whole, tmp_path, yields):
    first = Predictor(ASKED, "prediction", trained[0])
    before = list(itertools.islice(first.run(), yields))
    checkpoint.save(first.state_dict(), tmp_path / "prediction.pt")
    second = Predictor(ASKED, "prediction", trained[0])
    state = checkpoint.load(tmp_path / "prediction.pt")
    assert state is not None
    second.load_state_dict(state)
    assert second.evaluations == [record for record in before if record is not None]
    after = list(second.run())
    assert before + after == whole[1]
    assert_same(second.predictions, whole[0].predictions)


def test_an_ended_prediction_is_read_from_its_checkpoint_and_says_its_result_again(trained, whole, tmp_path):
    path = tmp_path / "prediction.pt"
    checkpoint.save(whole[0].state_dict(), path)
    assert_same(load_predictions(path), whole[0].predictions)
    for said in load_predictions(path).values():
        assert said.probabilities.shape == (IMAGES, 10)
        torch.testing.assert_close(said.probabilities.sum(1), torch.ones(IMAGES))
    again = Predictor(ASKED, "prediction", tmp_path)  # where there is no network, and none is needed
    again.load_state_dict(whole[0].state_dict())
    assert list(again.run()) == [whole[1][-1]]


def assert_same(one: dict[Crops, Predictions], other: dict[Crops, Predictions]) -> None:
    """Bit for bit."""
    assert list(one) == list(other) == [1, 144]
    for crops, said in one.items():
        assert torch.equal(said.probabilities, other[crops].probabilities)
        assert torch.equal(said.labels, other[crops].labels)


def changed(prediction: Prediction, **keys: Any) -> Prediction:
    return prediction.model_copy(update=keys)


def test_without_its_network_it_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"no .*member-1\.pt: train the network first"):
        next(Predictor(ASKED, "prediction", tmp_path).run())
    with pytest.raises(CheckpointError, match=r"there is no .*nothing\.pt"):
        load_predictions(tmp_path / "nothing.pt")


def test_the_checkpoint_of_another_network_is_refused(trained):
    optimizer = CONFIG.optimizer.model_copy(update={"rate": 0.1})
    other = changed(ASKED, config=CONFIG.model_copy(update={"optimizer": optimizer}))
    with pytest.raises(CheckpointError, match="member-1 was trained with other settings"):
        next(Predictor(other, "prediction", trained[0]).run())


def test_the_checkpoint_of_another_prediction_is_refused(trained, whole):
    for other in (changed(ASKED, images=2), changed(ASKED, network="member-2")):
        with pytest.raises(CheckpointError, match="of another prediction"):
            Predictor(other, "prediction", trained[0]).load_state_dict(whole[0].state_dict())


def test_a_torn_network_is_refused(trained, tmp_path):
    content: bytes = (trained[0] / "member-1.pt").read_bytes()
    Path(tmp_path / "member-1.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="is broken"):
        next(Predictor(ASKED, "prediction", tmp_path).run())
