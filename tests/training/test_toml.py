"""A run.toml becomes a configuration, or one line that says what is wrong in it."""

import json
import re
import textwrap
import tomllib
from datetime import date
from pathlib import Path

import pytest

from batchnorm.cli.train import EXAMPLE
from batchnorm.training import toml
from batchnorm.training.config import Config, InceptionModel
from batchnorm.training.toml import ConfigError

STEPS = {"training": {"steps": 100}}
TEXT = '[model]\nwidth = 0.5\n[data]\nsource = "Zürich"\n[training]\nsteps = 100\n'
SECTIONS = "model, data, optimizer, training, evaluation, checkpoints, machine"


def fails(*names, values=STEPS, changes=()):
    """In one line, which has each of `names`: the key as it stands in the file, its value, what would be right."""
    with pytest.raises(ConfigError) as error:
        toml.parse(values, changes)
    message = str(error.value)
    assert "\n" not in message
    assert [name for name in names if name not in message] == [], message


@pytest.mark.parametrize(
    ("values", "names"),
    [
        # unknown, at each level; what is like it, or all that there is
        ({"optimiser": {"rate": 1.0}}, ["unknown", "optimiser", "optimizer?"]),
        ({"weather": {}}, ["unknown", "weather", SECTIONS]),
        ({"torchvision": {}}, ["unknown", "torchvision", SECTIONS]),
        ({"optimizer": {"rte": 1.0}}, ["unknown", "optimizer.rte", "rate?"]),
        ({"checkpoints": {"x": 1}}, ["unknown", "checkpoints.x", "every_seconds, keep"]),
        ({"model": {"widht": 1.0}}, ["unknown", "model.widht", "width?"]),
        ({"model": {"inception": 1}}, ["unknown", "model.inception", "activation?"]),
        (
            {"model": {"name": "resnet18", "width": 1.0}},
            ["unknown", "model.width", "torchvision", "name, dropout"],
        ),
        # in the wrong place
        ({"training": 3}, ["[training]"]),
        ({"model": "resnet18"}, ["[model]"]),
        ({"data": [{"mirror": True}]}, ["[data]"]),
        ({"steps": 5}, ["steps = 5", "[training]"]),
        ({"weather": "fine"}, ['weather = "fine"', "no section"]),
        # of another type
        ({"optimizer": {"rate": "0.1"}}, ['optimizer.rate = "0.1"', "number"]),
        ({"optimizer": {"rate": True}}, ["optimizer.rate = true", "number"]),
        ({"training": {"steps": "100"}}, ['training.steps = "100"', "integer"]),
        ({"training": {"steps": 1.5}}, ["training.steps = 1.5", "integer"]),
        ({"training": {"steps": True}}, ["training.steps = true", "integer"]),
        ({"data": {"mirror": 1}}, ["data.mirror = 1", "true or false"]),
        ({"data": {"mirror": "no"}}, ['data.mirror = "no"', "true or false"]),
        ({"data": {"source": 2012}}, ["data.source = 2012", "string"]),
        ({"data": {"source": {"x": 1}}}, ['data.source = {"x": 1}', "string"]),
        ({"model": {"name": 3}}, ["model.name = 3", "string"]),
        ({"model": {"per_activation": "5b"}}, ['model.per_activation = "5b"', "list"]),
        ({"training": {"steps": date(2015, 3, 2)}}, ['training.steps = "2015-03-02"', "integer"]),
        ({"data": {"crop_area": ["a", 1]}}, ['data.crop_area[0] = "a"', "number"]),
        ({"data": {"crop_area": [0.1]}}, ["data.crop_area[1]", "missing"]),
        ({"data": {"crop_area": [0.1, 0.5, 1]}}, ["data.crop_area = [0.1, 0.5, 1]", "at most 2"]),
        # out of range
        ({"optimizer": {"rate": 0}}, ["optimizer.rate = 0", "greater than 0"]),
        ({"optimizer": {"rate": float("nan")}}, ["optimizer.rate = nan", "finite"]),
        ({"optimizer": {"rate": float("inf")}}, ["optimizer.rate = inf", "finite"]),
        ({"model": {"dropout": 1.0}}, ["model.dropout = 1.0", "less than 1"]),
        ({"training": {"steps": 0}}, ["training.steps = 0", "greater than or equal to 1"]),
        (
            {"data": {"distortion": "ful"}},
            ['data.distortion = "ful"', "'full'", "'reduced'", "'none'"],
        ),
        # several at once
        ({"training": {"steps": 0, "sed": 1}}, ["training.steps = 0", "; ", "training.sed", "seed?"]),
    ],
)
def test_what_is_wrong_is_said_in_the_words_of_the_file(values, names):
    fails(*names, values=STEPS | values)


@pytest.mark.parametrize("values", [{}, {"training": {}}, {"training": {"batch_size": 4}}])
def test_the_one_key_without_a_default_is_missed(values):
    fails("training.steps", "missing", values=values)


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
    fails("--set", "section.key=value", repr(change), changes=[change])


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ("optimizer.rate=", ['optimizer.rate = ""', "number"]),
        ("optimizer.rate=fast", ['optimizer.rate = "fast"', "number"]),
        ("data.mirror=True", ['data.mirror = "True"', "true or false"]),
        ("optimiser.rate=1", ["unknown", "optimiser", "optimizer?"]),
        ("optimizer.rte=1", ["unknown", "optimizer.rte", "rate?"]),
    ],
)
def test_a_wrong_change_is_said_like_a_wrong_file(change, names):
    fails(*names, changes=[change])


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
    ("content", "reason"),
    [
        (None, "No such file"),
        (TEXT.encode("utf-16"), "UTF-8"),
        (TEXT.encode("latin-1"), "UTF-8"),
        (b"[training]\nsteps = \n", "TOML.*line 2, column 9"),
        (b"steps: 5\n", "TOML"),
        (b"[training]\nsteps = 1\nsteps = 2\n", "TOML"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, content, reason):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}.*{reason}"):
        toml.read(path)


def test_an_empty_file_lacks_what_has_no_default(tmp_path):
    path = tmp_path / "run.toml"
    path.touch()
    with pytest.raises(ConfigError, match=r"training\.steps"):
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


ABSURD = [
    "nan",
    "inf",
    "-inf",
    "1e30",
    "1" + "0" * 30,
    "-1",
    "9" * 10_000,
    "[" * 5_000,
    "x" * 100_000,
    "true",
    "1e999",
    "[]",
]
NUMBERS = [
    f"{section}.{name}"
    for section in Config.model_fields
    for name, field in toml._keys(section).items()
    if field.annotation in (int, float, int | None, float | None)
]


@pytest.mark.parametrize("key", NUMBERS)
def test_an_absurd_number_is_one_line_that_names_the_key_and_its_range(key):
    refused = 0
    for value in ABSURD:
        try:
            toml.parse({"training": {"steps": 1}}, [f"{key}={value}"])
        except ConfigError as error:
            said, refused = str(error), refused + 1
            assert said.startswith(f"{key} = ") and "\n" not in said and len(said) < 500
            assert re.search("; it is (at least|above|at most|below) ", said)
    assert refused >= 9, f"only {refused}"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("training.steps=1e30", "valid integer; it is at least 1 and at most 1,000,000,000,000,000"),
        ("model.width=1e9", "model.width = 1000000000.0: .*; it is above 0 and at most 16"),
        ("data.image_size=1_000_000", "it is at least 8 and at most 8,192"),
        ("machine.loaders=100_000", "it is at least 0 and at most 256"),
        ("optimizer.rate=nan", "optimizer.rate = nan: .*finite number; it is above 0"),
    ],
)
def test_a_number_out_of_range_says_what_is_in_it(change, says):
    with pytest.raises(ConfigError, match=says):
        toml.parse({"training": {"steps": 1}}, [change])


def test_the_example_of_the_page_is_a_configuration():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (block,) = re.findall(r"^    \[model\]\n(?:(?:    .*)?\n)+", page, re.M)
    config = toml.parse(tomllib.loads(textwrap.dedent(block)))
    assert (config.optimizer.name, config.optimizer.warmup, config.training.label_smoothing) == (
        "AdamW",
        200,
        0.1,
    )


def test_without_a_value_a_key_of_the_file_is_left_out():
    values = {**STEPS, "optimizer": {"rate": 3.0}}
    assert toml.parse(values, ["optimizer.rate="]).optimizer.rate == 0.0015
    assert toml.parse(values, ["optimizer.rate=", "optimizer.rate=2"]).optimizer.rate == 2
    values = {**STEPS, "model": {"name": "bn-inception", "width": 0.5}}
    fails("unknown key model.width", "it is bn-inception's", values=values, changes=["model.name=resnet18"])
    assert toml.parse(values, ["model.name=resnet18", "model.width="]).model.name == "resnet18"
