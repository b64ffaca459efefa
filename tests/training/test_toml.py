"""A run.toml becomes a configuration, or one line that says what is wrong in it."""

import json
import re
import tomllib
from datetime import date

import pytest

from batchnorm.cli.train import EXAMPLE
from batchnorm.training import toml
from batchnorm.training.config import Config, InceptionModel
from batchnorm.training.toml import ConfigError

STEPS = {"training": {"steps": 100}}
TEXT = '[model]\nwidth = 0.5\n[data]\nsource = "Zürich"\n[training]\nsteps = 100\n'
SECTIONS = "model, data, optimizer, training, evaluation, checkpoints, machine"


def fails(says, values=STEPS, changes=()):
    with pytest.raises(ConfigError) as error:
        toml.parse(values, changes)
    assert str(error.value) == says


@pytest.mark.parametrize(
    ("values", "says"),
    [
        # unknown, at each level
        ({"optimiser": {"rate": 1.0}}, "unknown key optimiser: did you mean optimizer?"),
        ({"weather": {}}, f"unknown key weather: there are {SECTIONS}"),
        ({"torchvision": {}}, f"unknown key torchvision: there are {SECTIONS}"),
        ({"optimizer": {"rte": 1.0}}, "unknown key optimizer.rte: did you mean rate?"),
        (
            {"checkpoints": {"x": 1}},
            "unknown key checkpoints.x: there are every_seconds, keep",
        ),
        ({"model": {"widht": 1.0}}, "unknown key model.widht: did you mean width?"),
        ({"model": {"inception": 1}}, "unknown key model.inception: did you mean activation?"),
        (
            {"model": {"name": "resnet18", "width": 1.0}},
            "unknown key model.width of a torchvision model: there are name, dropout",
        ),
        # in the wrong place
        ({"training": 3}, "training is a section: write [training], and its keys below"),
        ({"model": "resnet18"}, "model is a section: write [model], and its keys below"),
        ({"data": [{"mirror": True}]}, "data is a section: write [data], and its keys below"),
        ({"steps": 5}, "steps = 5 stands in no section: write it below [training]"),
        ({"weather": "fine"}, 'weather = "fine" stands in no section, and no section has a key weather'),
        # of another type
        ({"optimizer": {"rate": "0.1"}}, 'optimizer.rate = "0.1": input should be a valid number'),
        ({"optimizer": {"rate": True}}, "optimizer.rate = true: input should be a valid number"),
        ({"training": {"steps": "100"}}, 'training.steps = "100": input should be a valid integer'),
        ({"training": {"steps": 1.5}}, "training.steps = 1.5: input should be a valid integer"),
        ({"training": {"steps": True}}, "training.steps = true: input should be a valid integer"),
        ({"data": {"mirror": 1}}, "data.mirror = 1: input should be true or false"),
        ({"data": {"mirror": "no"}}, 'data.mirror = "no": input should be true or false'),
        ({"data": {"source": 2012}}, "data.source = 2012: input should be a valid string"),
        ({"data": {"source": {"x": 1}}}, 'data.source = {"x": 1}: input should be a valid string'),
        ({"model": {"name": 3}}, "model.name = 3: input should be a valid string"),
        ({"model": {"per_activation": "5b"}}, 'model.per_activation = "5b": input should be a list'),
        (
            {"training": {"steps": date(2015, 3, 2)}},
            'training.steps = "2015-03-02": input should be a valid integer',
        ),
        ({"data": {"crop_area": ["a", 1]}}, 'data.crop_area[0] = "a": input should be a valid number'),
        ({"data": {"crop_area": [0.1]}}, "data.crop_area[1] is missing"),
        (
            {"data": {"crop_area": [0.1, 0.5, 1]}},
            "data.crop_area = [0.1, 0.5, 1]: list should have at most 2 items after validation, not 3",
        ),
        # out of range
        ({"optimizer": {"rate": 0}}, "optimizer.rate = 0: input should be greater than 0"),
        ({"optimizer": {"rate": float("nan")}}, "optimizer.rate = nan: input should be a finite number"),
        ({"optimizer": {"rate": float("inf")}}, "optimizer.rate = inf: input should be a finite number"),
        ({"model": {"dropout": 1.0}}, "model.dropout = 1.0: input should be less than 1"),
        ({"training": {"steps": 0}}, "training.steps = 0: input should be greater than or equal to 1"),
        (
            {"data": {"distortion": "ful"}},
            "data.distortion = \"ful\": input should be 'full', 'reduced' or 'none'",
        ),
        # several at once
        (
            {"training": {"steps": 0, "sed": 1}},
            "training.steps = 0: input should be greater than or equal to 1; "
            "unknown key training.sed: did you mean seed?",
        ),
    ],
)
def test_what_is_wrong_is_said_in_the_words_of_the_file(values, says):
    fails(says, STEPS | values)


@pytest.mark.parametrize("values", [{}, {"training": {}}, {"training": {"batch_size": 4}}])
def test_the_one_key_without_a_default_is_missed(values):
    fails("training.steps is missing", values)


def test_a_whole_number_is_a_number():
    config = toml.parse({**STEPS, "optimizer": {"rate": 1}, "data": {"crop_area": [0.5, 1]}})
    assert config.optimizer.rate == 1
    assert config.data.crop_area == (0.5, 1)


@pytest.mark.parametrize(
    ("change", "section", "name", "value"),
    [
        ("optimizer.rate=0.05", "optimizer", "rate", 0.05),
        ("optimizer.rate = 1", "optimizer", "rate", 1.0),
        (" optimizer . rate =5e-2", "optimizer", "rate", 0.05),
        ("training.steps=1_000", "training", "steps", 1000),
        ("data.mirror=false", "data", "mirror", False),
        ("data.crop_area=[0.5, 1]", "data", "crop_area", (0.5, 1.0)),
        ('model.per_activation=["mixed_5b"]', "model", "per_activation", ("mixed_5b",)),
        ("data.source=cifar-10", "data", "source", "cifar-10"),
        ("data.source='2012'", "data", "source", "2012"),
        ("data.source=/data/a folder=b#c", "data", "source", "/data/a folder=b#c"),
        ("evaluation.every=7", "evaluation", "every", 7),  # whose section is not in the file
    ],
)
def test_set_takes_values_as_in_toml_and_strings_without_quotes(change, section, name, value):
    before = json.loads(json.dumps(STEPS))
    assert getattr(getattr(toml.parse(before, [change]), section), name) == value
    assert before == STEPS  # a change is not made in what was given


def test_of_two_changes_of_a_key_the_last_one_counts():
    assert toml.parse(STEPS, ["training.steps=3", "training.steps=4"]).training.steps == 4


@pytest.mark.parametrize(
    "change", ["optimizer.rate", "rate=1", "a.b.c=1", ".rate=1", "optimizer.=1", "=", ""]
)
def test_set_says_how_it_is_written(change):
    fails(f"--set takes section.key=value, as in optimizer.rate=0.1, not {change!r}", changes=[change])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("optimizer.rate=", 'optimizer.rate = "": input should be a valid number'),
        ("optimizer.rate=fast", 'optimizer.rate = "fast": input should be a valid number'),
        ("data.mirror=True", 'data.mirror = "True": input should be true or false'),
        ("optimiser.rate=1", "unknown key optimiser: did you mean optimizer?"),
        ("optimizer.rte=1", "unknown key optimizer.rte: did you mean rate?"),
    ],
)
def test_a_wrong_change_is_said_like_a_wrong_file(change, says):
    fails(says, changes=[change])


def test_a_path_that_is_no_text_is_an_error_too():
    with pytest.raises(ConfigError, match="surrogate"):
        toml.parse(STEPS, ["data.source=\udcff"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_is_read_as_editors_write_it(tmp_path, encoding, end):
    path = tmp_path / "run.toml"
    path.write_bytes(TEXT.replace("\n", end).encode(encoding))
    config = toml.read(path, ["training.seed=3"])
    assert isinstance(config.model, InceptionModel)
    assert (config.model.width, config.data.source, config.training.seed) == (0.5, "Zürich", 3)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read {}: No such file or directory"),
        (TEXT.encode("utf-16"), "cannot read {}: it is not UTF-8 text"),
        (TEXT.encode("latin-1"), "cannot read {}: it is not UTF-8 text"),
        (b"[training]\nsteps = \n", "{} is not TOML: Invalid value (at line 2, column 9)"),
        (b"steps: 5\n", "{} is not TOML: "),
        (b"[training]\nsteps = 1\nsteps = 2\n", "{} is not TOML: Cannot overwrite a value"),
        (b"", "training.steps is missing"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, content, says):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(says.format(path))):
        toml.read(path)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="Is a directory"):
        toml.read(tmp_path)


def test_differences_are_those_that_change_a_number():
    one = toml.parse(STEPS)
    changes = ["optimizer.rate=0.1", "data.mirror=false", "machine.threads=2", "checkpoints.keep=1"]
    assert toml.differences(one, toml.parse(STEPS, changes)) == ["data.mirror", "optimizer.rate"]
    assert toml.differences(one, toml.parse(STEPS)) == []


def test_differences_between_kinds_of_model_are_the_keys_of_both():
    inception, resnet = toml.parse(STEPS), toml.parse(STEPS, ["model.name=resnet18", "model.dropout=0.4"])
    found = toml.differences(inception, resnet)
    assert {"model.name", "model.width"} <= set(found)
    assert "model.dropout" not in found  # the same in both
    assert set(found) == set(toml.differences(resnet, inception))


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["model.name=resnet18", "model.dropout=0.1"],
        ["model.name=resnet18"],
        [
            "model.per_activation=['mixed_5b']",
            "data.crop_area=[0.5, 1]",
            "training.ema=0.9",
            "optimizer.rate=1",
        ],
    ],
)
def test_what_a_record_holds_is_the_configuration_again(changes):
    config = toml.parse(STEPS, changes)
    assert toml.parse(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    assert toml.parse(config.model_dump(mode="json")) == config


def test_every_section_of_the_example_is_read():
    assert isinstance(toml.parse(tomllib.loads(EXAMPLE)), Config)


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), ("a", '"a"'), (0.1, "0.1"), (float("inf"), "inf"), ([1, "b"], '[1, "b"]')],
)
def test_values_are_written_as_in_toml(value, text):
    assert toml.literal(value) == text
    assert tomllib.loads(f"value = {text}")["value"] == value
