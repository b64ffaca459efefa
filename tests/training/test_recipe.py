"""The seven changes of section 4.2.1: their words, order and numbers, and what they make of a configuration."""

import re

import pytest

from batchnorm.training import toml
from batchnorm.training.config import Config, InceptionModel, Schedule
from batchnorm.training.recipe import VARIANTS, apply, steps

DEFAULT = Config(training=Schedule(steps=100))
TORCHVISION = toml.parse({"training": {"steps": 100}, "model": {"name": "resnet18"}})

# Section 4.2.1, the words that each item begins with, and those that say how much.
PAPER = [
    "Increase learning rate.",
    "Remove Dropout.",
    "Reduce the L2 weight regularization. While in Inception an L2 loss on the model parameters controls overfitting, "
    "in Modified BN-Inception the weight of this loss is reduced by a factor of 5.",
    "Accelerate the learning rate decay. In training Inception, learning rate was decayed exponentially. Because our "
    "network trains faster than Inception, we lower the learning rate 6 times faster.",
    "Remove Local Response Normalization.",
    "Shuffle training examples more thoroughly. We enabled within-shard shuffling.",
    "Reduce the photometric distortions.",
]
KEYS = [
    "optimizer.rate",
    "model.dropout",
    "optimizer.weight_decay",
    "optimizer.decay_every",
    "model.local_response_norm",
    "data.shuffle",
    "data.distortion",
]
MODIFIED = {
    "model.dropout": 0.0,
    "optimizer.weight_decay": pytest.approx(4e-5, rel=1e-12),
    "optimizer.decay_every": 53_333,
    "data.distortion": "reduced",
}


def changed(config, before=DEFAULT):
    """The keys that differ, with their values."""
    values = config.model_dump()
    return {key: values[key.split(".")[0]][key.split(".")[1]] for key in toml.differences(before, config)}


def lines(config, variant, without=()):
    return [str(each) for each in apply(config, variant, without)[1]]


def test_the_steps_are_the_papers_in_its_order_and_words():
    ours = steps(5)
    assert [step.number for step in ours] == [1, 2, 3, 4, 5, 6, 7]
    assert [step.key for step in ours] == KEYS
    for step, words in zip(ours, PAPER, strict=True):
        quoted = ".*".join(map(re.escape, step.quote.split(" [...] ")))
        assert re.fullmatch(quoted, words), step.quote


def test_the_default_configuration_is_the_papers_inception_with_bn():
    assert DEFAULT.optimizer.rate == 0.0015  # table in figure 3
    assert DEFAULT.model.dropout == 0.4  # section 4.2.3: "compared to 40% for the original Inception"


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("inception", {"model.batch_norm": False}),
        ("bn-baseline", {}),
        ("bn-x5", {"optimizer.rate": pytest.approx(0.0075, rel=1e-12), **MODIFIED}),
        ("bn-x30", {"optimizer.rate": pytest.approx(0.045, rel=1e-12), **MODIFIED}),
        (
            "bn-x5-sigmoid",
            {"model.activation": "sigmoid", "optimizer.rate": pytest.approx(0.0075, rel=1e-12), **MODIFIED},
        ),
    ],
)
def test_a_variant_changes_just_what_the_paper_names(variant, expected):
    config, applied = apply(DEFAULT, variant)
    assert changed(config) == expected
    assert {each.key for each in applied if each.changed} == set(expected)
    assert Config.model_validate(config.model_dump()) == config


def test_there_are_the_five_networks_of_figure_3():
    assert list(VARIANTS) == ["inception", "bn-baseline", "bn-x5", "bn-x30", "bn-x5-sigmoid"]


def test_what_is_switched_on_is_switched_off():
    sections = {
        "model": {"batch_norm": False, "local_response_norm": True, "activation": "sigmoid"},
        "data": {"shuffle": "shards"},
    }
    config, _ = apply(toml.parse({"training": {"steps": 1}, **sections}), "bn-x5")
    assert isinstance(config.model, InceptionModel)
    assert config.model.batch_norm
    assert not config.model.local_response_norm
    assert config.data.shuffle == "within-shards"
    assert config.model.activation == "sigmoid"  # bn-x5 says nothing about it


def test_nothing_is_made_stronger():
    gentle = toml.parse(
        {"training": {"steps": 1}, "data": {"distortion": "none"}, "optimizer": {"decay_every": 2}}
    )
    config, _ = apply(gentle, "bn-x30")
    assert config.data.distortion == "none"
    assert config.optimizer.decay_every == 1


@pytest.mark.parametrize("number", range(1, 8))
def test_a_step_left_out_changes_nothing_and_the_others_what_they_did(number):
    strong = DEFAULT.model_copy(
        update={
            "model": DEFAULT.model.model_copy(update={"local_response_norm": True}),
            "data": DEFAULT.data.model_copy(update={"shuffle": "shards"}),
        }
    )
    whole, _ = apply(strong, "bn-x5")
    part, applied = apply(strong, "bn-x5", without=[number])
    expected = changed(whole, strong)
    assert set(expected) == set(KEYS)
    del expected[KEYS[number - 1]]
    assert changed(part, strong) == expected
    assert [str(each) for each in applied if each.note == "left out"] == [
        f"{number}. {steps(5)[number - 1].name}: left out"
    ]


def test_the_input_stays_as_it_was():
    before = DEFAULT.model_dump()
    for variant in VARIANTS:
        apply(DEFAULT, variant)
    assert DEFAULT.model_dump() == before


def test_every_line_says_what_was_done():
    assert lines(DEFAULT, "bn-x5", without=[3]) == [
        "bn-x5: model.batch_norm is true already",
        "1. higher learning rate: optimizer.rate = 0.0015 → 0.0075",
        "2. no dropout: model.dropout = 0.4 → 0",
        "3. less L2: left out",
        "4. faster decay: optimizer.decay_every = 320000 → 53333",
        "5. no LRN: model.local_response_norm is false already",
        '6. more thorough shuffling: data.shuffle is "within-shards" already',
        '7. less photometric distortion: data.distortion = "full" → "reduced"',
    ]
    assert lines(DEFAULT, "inception") == ["inception: model.batch_norm = true → false"]
    assert lines(DEFAULT, "bn-x5-sigmoid")[1] == 'bn-x5-sigmoid: model.activation = "relu" → "sigmoid"'


def test_of_a_torchvision_model_it_says_what_it_has_not():
    config, _ = apply(TORCHVISION, "bn-x5-sigmoid")
    assert {"model.batch_norm", "model.activation", "model.dropout"}.isdisjoint(changed(config, TORCHVISION))
    said = lines(TORCHVISION, "bn-x5-sigmoid")
    assert said[:2] == [
        "bn-x5-sigmoid: resnet18 has no batch_norm",
        "bn-x5-sigmoid: resnet18 has no activation",
    ]
    # it may have one by itself, as vgg16 has: what a builder takes is not known before it is called
    assert said[3] == "2. no dropout: model.dropout is not set, resnet18 keeps its own"
    assert said[6] == "5. no LRN: resnet18 has no local_response_norm"


def test_a_torchvision_models_dropout_is_removed_where_it_is_set():
    given = toml.parse({"training": {"steps": 1}, "model": {"name": "vgg16", "dropout": 0.5}})
    assert apply(given, "bn-x5")[0].model.dropout == 0


@pytest.mark.parametrize(
    ("variant", "without", "says"),
    [
        ("bn-x7", (), "no recipe 'bn-x7': choose from inception, bn-baseline, bn-x5, bn-x30, bn-x5-sigmoid"),
        ("bn-x5", (2, 8), "no step 8 in section 4.2.1: they are 1 to 7"),
        ("bn-x5", (0,), "no step 0"),
        ("bn-baseline", (2,), "bn-baseline makes none of the seven changes: there is nothing to leave out"),
    ],
)
def test_what_there_is_not_is_said(variant, without, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        apply(DEFAULT, variant, without)
