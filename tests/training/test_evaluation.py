"""Networks that were trained are found, asked about every image, and averaged; nothing of it is written."""

import io
import re
import signal
import sys
import time
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console
from rich.text import Text
from torch import nn

from batchnorm import cli, memory
from batchnorm.cli.terminal import image_bar
from batchnorm.data.catalogue import load
from batchnorm.data.corrupt import Corrupt
from batchnorm.data.crops import multi_crop, single_crop
from batchnorm.data.idx import DataError
from batchnorm.data.source import InMemory, Unreadable
from batchnorm.data.subset import Subset
from batchnorm.records import Evaluation, Result, read
from batchnorm.training import checkpoint, toml
from batchnorm.training.evaluation import Predictions, load_network, network_file, predict
from batchnorm.training.network import NetworkError, build
from batchnorm.training.score import Score
from batchnorm.training.session import Session
from tests.data.pictures import image_folder

SMALL: dict[str, Any] = {
    "model": {"width": 0.05, "stem": "small"},
    "data": {"source": "mnist-10k", "image_size": 28, "distortion": "none", "mirror": False},
    "optimizer": {"rate": 0.1},
    "training": {"steps": 12, "batch_size": 16, "ema": 0.5},
    "evaluation": {"every": 6, "images": 40, "population_batches": 2},
    "machine": {"device": "cpu", "threads": 1, "keep_memory": False},
}
SIZE = 8


class Silent:
    def on_start(self, *_):
        pass

    on_step = on_evaluation = on_start

    def on_stop_request(self):
        pass


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    AcceleratorState._reset_state(True)  # it holds a process to one precision, and other tests use others
    folder = tmp_path_factory.mktemp("runs") / "digits"
    Session(toml.parse(SMALL), folder, "batchnorm train", Silent()).run()
    return folder


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """The command, in this process: what it leaves with, prints and says is wrong."""
    monkeypatch.setattr(memory, "keep_memory", lambda: True)  # it would be this process's for good

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["batchnorm", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *capsys.readouterr()

    return command


def save_network(path, config, classes, channels, changes=None):
    network = build(config, classes, channels)
    state = {
        "config": config.model_dump(mode="json"),
        "classes": classes,
        "channels": channels,
        "step": 1_234,
    }
    both = {"population": network.state_dict(), "moving": network.state_dict()}
    checkpoint.save(state | both | (changes or {}), path)
    return path


def linear(classes=3, channels=1):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * SIZE * SIZE, classes)).eval()


def noise(images=10, classes=3):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (images, 1, 11, 9), dtype=torch.uint8, generator=generator)
    return InMemory(pixels, torch.arange(images) % classes, classes, "noise")


class Holed:
    """A source some of whose images cannot be read."""

    shards, channels, classes = None, 1, 3

    def __init__(self, bad):
        self._whole, self._bad = noise(), bad

    def __len__(self):
        return len(self._whole)

    def __getitem__(self, index):
        if index in self._bad:
            raise Unreadable(self.name(index), "a hole")
        return self._whole[index]

    def name(self, index):
        return f"hole {index}"


def said(network, source, **options):
    return Predictions.concatenate(predict(network, source, SIZE, **options))


def same(one, other):
    return torch.equal(one.probabilities, other.probabilities) and torch.equal(one.labels, other.labels)


@pytest.mark.slow
@pytest.mark.parametrize("loaders", [0, 1])
def test_one_crop_is_seen_as_the_network_sees_it(loaders):
    network, source = linear(), noise()
    crops = torch.stack([single_crop(SIZE)(image) for image, _ in source])
    predictions = said(network, source, loaders=loaders)
    torch.testing.assert_close(predictions.probabilities, network(crops).softmax(1).detach())
    assert torch.equal(predictions.labels, source.labels)


@pytest.mark.parametrize("batch_size", [1000, 200, 144, 50])
def test_of_144_crops_the_probabilities_are_averaged(batch_size):
    network, source = linear(), noise(4)
    crops = torch.stack([multi_crop(SIZE)(image) for image, _ in source])
    predictions = said(network, source, crops=144, batch_size=batch_size)
    each = torch.stack([network(of_image).softmax(1).mean(0) for of_image in crops]).detach()
    torch.testing.assert_close(predictions.probabilities, each)
    of_mean = torch.stack([network(of_image).mean(0).softmax(0) for of_image in crops])
    assert (each - of_mean).abs().max() > 1e-3  # which the mean of the logits would not be


@pytest.mark.parametrize(("crops", "sizes"), [(1, [4, 4, 2]), (144, [1] * 10)])
def test_after_each_part_it_can_be_stopped_and_continued_bit_for_bit(crops, sizes):
    network, source = linear(), noise()
    parts = list(predict(network, source, SIZE, crops=crops, batch_size=4))
    assert list(map(len, parts)) == sizes
    rest = said(network, source, crops=crops, batch_size=4, indices=range(sizes[0], 10))
    assert same(rest, Predictions.concatenate(parts[1:]))


def test_it_goes_through_the_indices_in_their_order():
    network, source = linear(), noise()
    whole, chosen = said(network, source), said(network, source, indices=[7, 0, 7])
    torch.testing.assert_close(chosen.probabilities, whole.probabilities[[7, 0, 7]])
    assert chosen.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("crops", [1, 144])
def test_an_unreadable_image_keeps_its_row_and_is_counted_but_not_scored(crops):
    network, source, corrupt = linear(), Holed([2, 4, 5, 6, 7]), Corrupt(1, 10)
    predictions = said(
        network, source, crops=crops, batch_size=4, corrupt=corrupt
    )  # the second part has none
    readable = [0, 1, 3, 8, 9]
    whole = said(network, noise(), crops=crops)
    torch.testing.assert_close(predictions.probabilities[readable], whole.probabilities[readable])
    assert predictions.probabilities.isnan().all(1).nonzero().flatten().tolist() == [2, 4, 5, 6, 7]
    assert predictions.labels.tolist() == [0, 1, -1, 0, -1, -1, -1, -1, 2, 0]
    assert predictions.score == Score.of(whole.probabilities[readable], whole.labels[readable])
    assert corrupt.names == [f"hole {at}" for at in (2, 4, 5, 6, 7)]


def test_unless_they_are_counted_no_image_may_be_unreadable():
    with pytest.raises(DataError, match="hole 3: a hole"):
        said(linear(), Holed([3]))


def test_a_network_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=re.escape("call network.eval()")):
        predict(linear().train(), noise(), SIZE)


def test_what_it_says_can_be_changed_and_saved(tmp_path):
    (part,) = predict(linear(), noise(), SIZE)
    part.probabilities.mul_(2)  # tensors of inference mode could not be
    assert not part.probabilities.requires_grad


def test_an_ensemble_is_the_arithmetic_mean_of_the_probabilities():
    labels = torch.tensor([0, 1])
    sure, unsure = torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([[0.4, 0.6], [0.2, 0.8]])
    mean = Predictions.mean([Predictions(rows, labels) for rows in (sure, unsure, unsure)])
    torch.testing.assert_close(mean.probabilities, (sure + 2 * unsure) / 3)
    assert mean.score == Score(2, 2, 2)  # where each network alone is wrong once


def test_an_ensemble_leaves_out_what_one_network_could_not_read():
    network = linear()
    whole, holed = said(network, noise()), said(network, Holed([3]), corrupt=Corrupt(1, 10))
    for several in ([whole, holed], [holed, whole]):
        assert Predictions.mean(several).score.images == 9


@pytest.mark.slow
def test_a_runs_networks_are_as_good_as_its_records_say(run, evaluate):
    records = list(read(run / "records.jsonl"))
    result = records[-1]
    assert isinstance(result, Result) and result.accuracy_moving is not None
    population, moving = (
        load_network(network_file(run, "final.pt"), by).network.state_dict()
        for by in ("population", "moving")
    )
    assert any(not torch.equal(population[name], moving[name]) for name in population)
    evaluations = [record for record in records if isinstance(record, Evaluation)]
    best = max(evaluations, key=lambda evaluation: evaluation.accuracy)
    averaged = evaluations[-1].accuracy_average
    assert averaged is not None
    for options, step, accuracy in (
        ([], best.step, best.accuracy),
        (["--final"], 12, result.accuracy),
        (["--final", "--statistics", "moving"], 12, result.accuracy_moving),
        (["--final", "--statistics", "average"], 12, averaged),
    ):
        code, out, error = evaluate(run, "--images", 40, *options)
        assert (code, error) == (0, "")
        assert re.search(rf" {step} +{accuracy:.2%} +{1 - accuracy:.2%}\s", out), (options, out)


def test_of_a_folder_best_is_taken_unless_final_is_asked_for(tmp_path, evaluate):
    for name, step in (("best.pt", 1_111), ("final.pt", 2_222)):
        save_network(tmp_path / "checkpoints" / name, toml.parse(SMALL), 10, 1, {"step": step})
    assert " 1,111 " in evaluate(tmp_path, "--images", 2)[1]
    assert " 2,222 " in evaluate(tmp_path, "--images", 2, "--final")[1]


@pytest.mark.slow
def test_it_says_what_was_looked_at(run, evaluate, monkeypatch):
    monkeypatch.chdir(run.parent)
    code, out, _ = evaluate("digits", "--images", 40)
    assert code == 0
    assert out.startswith(
        "images      40 of 2,000, the first in a fixed random order, of the validation set of mnist-10k\n"
        "crops       1 of 28 × 28 pixels\n"
        "statistics  population (Algorithm 2)\n"
    )
    assert "top-5" not in out  # of ten classes half would do
    assert evaluate("digits", "--images", 2_000_000, "--crops", 1)[1].startswith(
        "images      2,000, the validation set of mnist-10k\n"
    )


@pytest.mark.slow
def test_several_networks_are_an_ensemble(run, evaluate, monkeypatch):
    monkeypatch.chdir(run.parent)
    code, out, _ = evaluate("digits", "digits/checkpoints/final.pt", "--crops", 144, "--images", 2)
    assert code == 0
    *_, first, second, ensemble = out.splitlines()
    saved = [load_network(network_file(run, name)) for name in ("best.pt", "final.pt")]
    some = Subset(load("mnist-10k", "val"), 2)
    every = [Predictions.concatenate(predict(each.network, some, 28, crops=144)) for each in saved]
    accuracies = [each.score.accuracy for each in [*every, Predictions.mean(every)]]
    assert first.split()[0] == "digits"
    assert second.split()[0] == "digits/checkpoints/final.pt"
    assert ensemble.startswith("ensemble of 2 ")
    assert [line.split()[-2] for line in (first, second, ensemble)] == [f"{each:.2%}" for each in accuracies]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images in eleven classes, two of which cannot be read, and a network for it."""
    root = image_folder(tmp_path_factory.mktemp("pictures"), 1, 2, tuple("abcdefghijk"))
    for name in ("a/00.jpg", "k/01.jpg"):
        (root / "val" / name).write_bytes(b"no picture")
    config = toml.parse(
        {**SMALL, "data": {"source": str(root), "image_size": 16}, "model": {"width": 0.05, "stem": "small"}}
    )
    return save_network(root / "network.pt", config, 11, 3)


def test_of_many_classes_the_five_likeliest_count_too_and_unreadable_images_are_named(
    pictures, evaluate, monkeypatch
):
    monkeypatch.chdir(pictures.parent)
    code, out, _ = evaluate("network.pt")
    assert code == 0
    assert "left out    2 of 22 images cannot be read: val/a/00.jpg" in out.replace(f"{pictures.parent}/", "")
    saved = load_network(pictures)
    source = load(str(pictures.parent), "val")
    score = Predictions.concatenate(predict(saved.network, source, 16, corrupt=Corrupt(1, 22))).score
    assert score.images == 20
    first, five = score.accuracy, score.accuracy_top5
    shares = [f"{share:.2%}" for share in (first, 1 - first, five, 1 - five)]
    assert out.splitlines()[-1].split() == ["network.pt", "1,234", *shares]


def test_where_no_image_can_be_read_it_says_so(pictures, evaluate, tmp_path):
    root = image_folder(tmp_path, 1, 1, tuple("abcdefghijk"))
    for path in (root / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    code, _, error = evaluate(pictures, "--data", root)
    assert code == 1
    assert error.startswith("error: no image can be read: 11 of 11 images cannot be read")


@pytest.mark.slow
def test_nothing_is_written(run, evaluate):
    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.parent.rglob("*")}

    before = state()
    assert evaluate(run, "--images", 5)[0] == 0
    assert state() == before


def test_weights_of_float64_are_taken_to_the_last_bit(tmp_path):
    config = toml.parse({**SMALL, "training": {"steps": 1, "precision": "float64"}})
    third = build(config, 10, 1).double().state_dict()
    for value in third.values():
        value.fill_(1 / 3)
    saved = load_network(save_network(tmp_path / "double.pt", config, 10, 1, {"population": third}))
    weights = saved.network.state_dict()
    assert all(
        value.flatten()[0].item() == 1 / 3 for name, value in weights.items() if "num_batches" not in name
    )
    (part,) = predict(saved.network, load("mnist-10k", "val"), 28, indices=[0])
    assert part.probabilities.dtype == torch.float32


def test_a_network_without_bn_says_that_statistics_do_not_matter(tmp_path, evaluate):
    config = toml.parse({**SMALL, "model": {**SMALL["model"], "batch_norm": False}})
    code, out, _ = evaluate(save_network(tmp_path / "plain.pt", config, 10, 1), "--images", 3)
    assert code == 0
    assert "statistics  none: there is no BN\n" in out


GIVE = ("folder", "best.pt", "final.pt")  # what would be right


def spoilt(kind, run, folder):
    """A path that no network can be taken from."""
    path, best = folder / f"{kind}.pt", run / "checkpoints" / "best.pt"
    if kind == "step":
        return next((run / "checkpoints").glob("step-*.pt"))
    if kind == "torn":
        path.write_bytes(best.read_bytes()[:-100])
    if kind == "rotten":
        content = bytearray(best.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    if kind == "text":
        path.write_text("[training]\nsteps = 5\n")
    if kind == "foreign":
        torch.save(linear().state_dict(), path)
    if kind == "list":
        torch.save([1, 2], path)
    if kind == "empty":
        path = folder
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nowhere", "no file"),
        ("empty", "checkpoints/best.pt"),
        ("step", "no network"),
        ("foreign", "no network"),
        ("list", "broken"),
        ("torn", "broken"),
        ("rotten", "broken"),
        ("text", "broken"),
    ],
)
def test_what_is_no_network_is_one_line_that_says_what_to_give(run, evaluate, tmp_path, kind, reason):
    path = spoilt(kind, run, tmp_path)
    code, out, error = evaluate(path)
    assert (code, out, len(error.splitlines())) == (1, "", 1)
    assert error.startswith("error: ")
    assert all(part in error for part in (str(path), reason, *GIVE)), error


@pytest.mark.parametrize(
    "changes", [{"config": {"training": {"pace": 1}}}, {"population": {}}, {"classes": 7}]
)
def test_a_network_of_another_version_is_one_line(tmp_path, changes):
    path = save_network(tmp_path / "old.pt", toml.parse(SMALL), 10, 1, changes)
    with pytest.raises(
        NetworkError, match=re.escape(f"{path} was written by another version of batchnorm: ")
    ) as error:
        load_network(path)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "names"),
    [
        (
            ["RUN", "--data", "PICTURES"],
            ["best.pt", "1 channel", "10 classes", "PICTURES", "3 channels", "11 classes"],
        ),
        (["RUN", "NETWORK"], ["PICTURES", "mnist-10k", "--data"]),
        (["RUN", "--data", "nowhere"], ["'nowhere'", "folder"]),
        (["RUN", "--crops", "10"], ["--crops 10", "1 or 144"]),
        (["RUN", "--statistics", "batch"], ["--statistics batch", "population", "moving", "average"]),
    ],
)
def test_what_does_not_go_together_is_named(run, pictures, evaluate, options, names):
    places = {"RUN": str(run), "NETWORK": str(pictures), "PICTURES": str(pictures.parent)}
    code, out, error = evaluate(*[places.get(option, option) for option in options])
    assert (code, out, len(error.splitlines())) == (1, "", 1)
    assert [name for name in names if places.get(name, name) not in error] == [], error


def test_data_that_moved_can_be_named(pictures, evaluate, tmp_path):
    config = load_network(pictures).config
    gone = config.model_copy(update={"data": config.data.model_copy(update={"source": "gone"})})
    path = save_network(tmp_path / "network.pt", gone, 11, 3)
    code, _, error = evaluate(path)
    assert code == 1
    assert error.endswith("; name the run's data with --data\n")
    assert evaluate(path, "--data", pictures.parent)[0] == 0


@pytest.mark.slow
def test_ctrl_c_ends_it_quietly(run, evaluate, monkeypatch):
    monkeypatch.setattr(InMemory, "__getitem__", lambda *_: signal.raise_signal(signal.SIGINT))
    assert evaluate(run) == (130, "", "")


def test_the_bar_fits_a_terminal_and_leaves_nothing_behind():
    screen = io.StringIO()
    with image_bar(Console(width=80, force_terminal=True, file=screen), 50_000, 6) as advance:
        advance(290_000)
        time.sleep(0.05)  # no more than 20,000 images/s
        advance(1_000)
    (shown,) = (line for line in Text.from_ansi(screen.getvalue()).plain.splitlines() if "291,000 of" in line)
    assert re.search(r"291,000 of 6 × 50,000 images +[\d,.]+ images/s left +\d:\d\d:\d\d$", shown)
    assert len(shown) <= 80
    assert screen.getvalue().endswith("\x1b[2K")  # the line is cleared


def test_without_an_average_of_the_weights_there_is_none_to_evaluate(run, tmp_path):
    state = checkpoint.load(network_file(run))
    assert state is not None
    checkpoint.save(state | {"average": None}, tmp_path / "best.pt")
    with pytest.raises(NetworkError, match="holds no averaged weights"):
        load_network(tmp_path / "best.pt", "average")
