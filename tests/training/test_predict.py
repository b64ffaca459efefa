"""`batchnorm predict` and `batchnorm.training.load`: a trained network used on images, real files of every kind."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import batchnorm
import batchnorm.training
from batchnorm.data.catalogue import load
from batchnorm.data.images import decode
from batchnorm.training.network import NetworkError
from tests.command import in_this_process
from tests.data.pictures import image_folder
from tests.mutations.mutation import Mutation

pytestmark = pytest.mark.slow

RUN = """
[model]
width = 0.05
stem = "small"
[data]
image_size = 16
distortion = "none"
[training]
steps = 30
batch_size = 8
[evaluation]
every = 30
population_batches = 2
[optimizer]
rate = 0.05
[machine]
threads = 1
device = "cpu"
keep_memory = false
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Colour images in folders, which are the names of the classes."""
    root = image_folder(tmp_path_factory.mktemp("pictures"))
    return Path(root)


def trained(folder, source):
    (folder / "run.toml").write_text(RUN)
    done = in_this_process(
        "train",
        folder / "run.toml",
        "--out",
        folder / "run",
        "--set",
        f"data.source={json.dumps(str(source))}",
    )
    assert done.code == 0, done.error
    return folder / "run"


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("colour"), pictures)


@pytest.fixture(scope="module")
def run_of_digits(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("grey"), "mnist-10k")


def images_of(root):
    return sorted(path for path in (root / "val").rglob("*") if path.is_file())


def test_the_class_of_an_image_is_the_name_of_its_folder(run, pictures):
    saved = batchnorm.training.load(run)
    names = sorted(entry.name for entry in (pictures / "train").iterdir())
    assert list(saved.class_names) == names
    assert isinstance(saved, batchnorm.training.SavedNetwork)
    files = images_of(pictures)
    done = in_this_process("predict", run, *files, "--top", 2, "--json")
    assert done.code == 0, done.error
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [line["image"] for line in found] == [str(path) for path in files]
    for line in found:
        with torch.inference_mode():
            image = saved.transform(decode(Path(line["image"]), ""))
            assert (image.dtype, image.device) == (torch.float32, torch.device("cpu"))
            probabilities = saved.network(image[None].contiguous(memory_format=torch.channels_last)).softmax(
                1
            )[0]
        best = probabilities.topk(2)
        assert [each["class"] for each in line["classes"]] == [names[at] for at in best.indices]
        assert [each["probability"] for each in line["classes"]] == pytest.approx(
            best.values.tolist(), abs=1e-5
        )


def test_a_folder_is_all_images_in_it_and_what_is_hidden_is_not(run, pictures, tmp_path):
    first, second, *_ = images_of(pictures)
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    (tmp_path / ":car:.png").write_bytes(first.read_bytes())
    for name in ("a.jpg", "deep/b.JPG", "deep/.c.jpg", "deep/.hidden/d.jpg", "deep/notes.txt"):
        (tmp_path / name).write_bytes(first.read_bytes())
    done = in_this_process("predict", run, tmp_path, second)
    assert done.code == 0, done.error
    shown = [line.split("  ")[0] for line in done.out.splitlines()]
    assert shown == [
        str(tmp_path / ":car:.png"),
        str(tmp_path / "a.jpg"),
        str(tmp_path / "deep" / "b.JPG"),
        str(second),
    ]
    assert all(line.rstrip().endswith("%") for line in done.out.splitlines())


def test_colour_becomes_grey_for_a_network_of_grey_images(run_of_digits, tmp_path):
    image, _ = load("mnist-10k", "val")[0]
    Image.fromarray(image[0].numpy()).save(tmp_path / "grey.png")
    Image.fromarray(image[0].numpy()).convert("RGB").save(tmp_path / "colour.png")
    Image.fromarray(image[0].numpy()).convert("RGBA").save(tmp_path / "transparent.png")
    done = in_this_process("predict", run_of_digits, tmp_path, "--top", 10)
    answers = {line.split("  ", 1)[1] for line in done.out.splitlines()}
    assert done.code == 0 and len(answers) == 1
    with torch.inference_mode():
        saved = batchnorm.training.load(run_of_digits)
        expected = saved.network(saved.transform(image)[None]).softmax(1)[0]
    assert answers.pop().startswith(
        f"{saved.class_names[int(expected.argmax())]} {float(expected.max()):.2%}"
    )


def test_images_that_cannot_be_read_are_named_and_the_rest_is_classified(run, pictures, tmp_path):
    torn = tmp_path / "torn.jpg"
    torn.write_bytes(images_of(pictures)[0].read_bytes()[:50])
    good = images_of(pictures)[1]
    done = in_this_process("predict", run, torn, good)
    assert done.code == 1
    assert done.out.startswith(str(good)) and len(done.out.splitlines()) == 1
    assert str(torn) in done.error and "1 of 2 images could not be read" in done.error
    (first, second) = map(json.loads, in_this_process("predict", run, torn, good, "--json").out.splitlines())
    assert first["image"] == str(torn) and first["error"]
    assert second["classes"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["RUN", "nowhere.jpg"], "there is no image nowhere.jpg"),
        (["RUN", "EMPTY"], "has no images in it"),
        (["nowhere", "IMAGE"], "give a run's folder"),
        (["RUN", "IMAGE", "--crops", "7"], "choose 1 or 144"),
        (["RUN", "IMAGE", "--statistics", "mean"], "choose population or moving or average"),
        (["RUN", "IMAGE", "--statistics", "average"], "no averaged weights"),
    ],
)
def test_errors_are_one_line(run, pictures, tmp_path, arguments, says):
    places = {"RUN": run, "IMAGE": images_of(pictures)[0], "EMPTY": tmp_path}
    done = in_this_process("predict", *[places.get(each, each) for each in arguments])
    assert done.code == 1
    assert says in done.error and done.error.startswith("error: ") and len(done.error.splitlines()) == 1


def test_all_crops_of_an_image_and_the_moving_averages(run, pictures):
    image = images_of(pictures)[0]
    one, all_crops, moving = (
        in_this_process("predict", run, image, "--json", *options).out
        for options in ([], ["--crops", 144], ["--statistics", "moving"])
    )
    assert len({one, all_crops, moving}) == 3


def test_a_network_of_an_earlier_version_has_numbers(run, tmp_path):
    from batchnorm.training import checkpoint

    state = checkpoint.load(run / "checkpoints" / "best.pt")
    assert state is not None
    del state["class_names"]
    checkpoint.save(state, tmp_path / "best.pt")
    assert batchnorm.training.load(tmp_path / "best.pt").class_names == ("0", "1", "2")[: state["classes"]]
    with pytest.raises(NetworkError, match="give a run's folder"):
        batchnorm.training.load(str(tmp_path))
    for wrong in (["x"], 5, [1, 2], None):
        checkpoint.save({**state, "class_names": wrong}, tmp_path / "best.pt")
        with pytest.raises(NetworkError, match="other names"):
            batchnorm.training.load(tmp_path / "best.pt")


def test_the_names_of_the_package_are_loaded_when_they_are_asked_for():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        batchnorm.training.nothing  # noqa: B018
    code = "import batchnorm.training.config, sys; sys.exit('torchvision' in sys.modules)"
    assert os.system(f'{sys.executable} -c "{code}"') == 0


MUTATIONS = [
    Mutation(
        "classes in another order", "training/evaluation.py",
        'state["step"], tuple(names))', 'state["step"], tuple(names[::-1]))',
        "each image would get the name of another class",
    ),
]  # fmt: skip
