"""States that no trainer can have had: refused by the key, before anything changes."""

import copy
import itertools
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from batchnorm.data.digits import Digits
from batchnorm.records import Evaluation
from batchnorm.training import toml
from batchnorm.training.checkpoint import CheckpointError
from batchnorm.training.digits_trainer import DigitsTrainer, Training
from batchnorm.training.trainer import Trainer
from tests.mutations.mutation import Mutation
from tests.training.tiny import TINY, same

ABSENT = object()
GROUP = ("optimizer", "param_groups", 0)


def evaluation(step, job="job"):
    return Evaluation(job=job, step=step, loss=1.0, accuracy=0.5).model_dump_json()


def changed(state, path, value):
    """A copy of nested dicts and lists, in which one value is another, or absent."""
    copied = part = copy.deepcopy(state)
    for key in path[:-1]:
        part = part[key]
    if value is ABSENT:
        del part[path[-1]]
    else:
        part[path[-1]] = value(part[path[-1]]) if callable(value) else value
    return copied


NUMBERS = [
    *((("step",), value, "step is ") for value in (-5, 10**9, 7, None, "7", 2.0, True, float("nan"))),
    *((("losses",), value, "losses is ") for value in (-1, 3, None, "2")),
    *((("seconds",), value, "seconds is ") for value in (-1.0, float("nan"), float("inf"), None, "1")),
]
OPTIMIZERS = [
    ((*GROUP, "maximize"), True, "maximize is True, not False"),
    ((*GROUP, "momentum"), 0.5, "momentum is 0.5"),
    ((*GROUP, "nesterov"), "no", "nesterov is 'no'"),
    ((*GROUP, "lr"), 0.06, "lr is 0.06"),
    ((*GROUP, "lr"), None, "lr is None"),
    ((*GROUP, "params"), lambda params: params[::-1], "params is"),
    ((*GROUP, "more"), 1, r"param_groups\[0\] has other keys"),
    (("optimizer", "param_groups"), [], "param_groups is no list"),
    (("optimizer", "state", 1000), {}, "other parameters"),
    (("optimizer", "state"), None, "other parameters"),
]
RECORDS: list[tuple[tuple[Any, ...], Any, str]] = [
    (("evaluations",), ["{}"], "records"),
    (("evaluations",), 3, "records"),
    (("evaluations",), [3], "records"),
    (("evaluations",), [evaluation(2), evaluation(1)], "at step 1 after 2"),
    (("evaluations",), [evaluation(6)], "at step 6"),
    (("evaluations",), [evaluation(1, "another")], "of another"),
    (("more",), 1, "other keys"),
]
IMPOSSIBLE = [
    *NUMBERS,
    *OPTIMIZERS,
    *RECORDS,
    (("classes",), 11, "classes is 11"),
    (("channels",), None, "channels is None"),
    (("diverged",), 0, "diverged is 0"),
    (("optimizer", "state", 0, "momentum_buffer"), lambda buffer: buffer[:1], "momentum_buffer is no tensor"),
    (("optimizer", "state", 0, "momentum_buffer"), lambda buffer: buffer.double(), "momentum_buffer is no"),
    (("optimizer", "state", 0), 3, r"state\[0\] has other keys"),
    (("schedule", "last_epoch"), 3, "schedule.last_epoch is 3"),
    (("schedule", "gamma"), 2.0, "schedule.gamma is 2.0"),
    (("schedule", "step_size"), ABSENT, "schedule has other keys"),
    (("random",), [], "random is no list"),
    (("random",), ABSENT, "other keys"),
    (("random", 0, 0), lambda states: states[:-1], r"random\[0\]\[0\] is no tensor"),
    (("random", 0, 0), torch.full((5056,), 255, dtype=torch.uint8), "is no state of a random generator"),
    (("random", 0), None, r"random\[0\] is no list"),
    (("loss_sum",), torch.zeros(2), "loss_sum"),
    (("loss_sum",), 0.5, "loss_sum"),
    (("model",), {}, "model has other keys"),
    (("model", "classifier.weight"), lambda weight: weight.double(), "classifier.weight is no tensor"),
    (("model", "classifier.weight"), None, "classifier.weight is no tensor"),
    (("average",), {}, "average is"),
    (("corrupt",), {}, "corrupt has other keys"),
    (("corrupt", "train", "found"), {"a": 1}, "no dict of texts"),
    (("result",), "none", "records"),
    (("result",), 1, "records"),
]
OF_DIGITS = [
    *NUMBERS,
    *OPTIMIZERS[:1],
    *OPTIMIZERS[3:7],
    *RECORDS,
    (("model", "made_up.weight"), None, "model has other keys"),
    (("random",), torch.zeros(3, dtype=torch.uint8), "is no tensor"),
    (("loss_sum",), torch.zeros(2), "loss_sum is no tensor"),
    (("watched",), [torch.zeros(2)], "watched is no list of 0"),
]


def names(cases):
    return [f"{'.'.join(map(str, path))} {place}" for place, (path, *_) in enumerate(cases)]


def trainer():
    AcceleratorState._reset_state(True)
    return Trainer(toml.parse(TINY), "job")


def digits_trainer():
    settings = Training(batch_norm=True, rate=0.05, steps=6, seed=0, hidden=(20,))
    return DigitsTrainer(settings, Digits.load(), "job")


def after_two(make):
    each = make()
    for _ in itertools.islice(each.run(), 2):
        pass
    return each.state_dict()


@pytest.fixture(scope="module")
def state():
    return after_two(trainer)


@pytest.fixture(scope="module")
def state_of_digits():
    return after_two(digits_trainer)


def refused(fresh, state, path, value, says):
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(CheckpointError, match=rf"does not fit the network: delete it.*\(.*{says}") as caught:
        fresh.load_state_dict(changed(state, path, value))
    assert "\n" not in str(caught.value)
    assert same(fresh.state_dict(), before)


@pytest.mark.parametrize(("path", "value", "says"), IMPOSSIBLE, ids=names(IMPOSSIBLE))
def test_of_a_training(path, value, says, state):
    refused(trainer(), state, path, value, says)


@pytest.mark.parametrize(("path", "value", "says"), OF_DIGITS, ids=names(OF_DIGITS))
def test_of_the_digits_experiment(path, value, says, state_of_digits):
    refused(digits_trainer(), state_of_digits, path, value, says)


def test_what_a_trainer_had_is_taken(state, state_of_digits):
    for make, its in ((trainer, state), (digits_trainer, state_of_digits)):
        each = make()
        each.load_state_dict(its)
        assert each.step == 2
        assert same(each.state_dict(), its)


def test_a_run_that_began_on_a_device_may_go_on_without_it(state):
    each = trainer()
    of_device = torch.zeros(16, dtype=torch.uint8)
    each.load_state_dict(changed(state, ("random", 0), lambda states: [*states, of_device]))
    assert each.step == 2


def test_an_evaluation_is_not_listed_before_it_is_due():
    AcceleratorState._reset_state(True)
    changes = "training.steps=1_000_000_000_000", "evaluation.apart=1e-300"
    values = {**TINY, "evaluation": {"images": 40, "population_batches": 2}}
    each = Trainer(toml.parse(values, changes), "job")
    for _ in itertools.islice(each.run(), 3):
        pass
    assert each.step == 3


MUTATIONS = [
    Mutation(
        "an optimizer that climbs", "training/state.py",
        "known = math.isclose(group[name], rate, rel_tol=1e-6) if name == \"lr\" else group[name] == value",
        "known = True", "it trains to other numbers", ("training/test_state.py",),
    ),
    Mutation(
        "a step beyond the last", "training/state.py",
        "or not low <= state <= high", "or state < low", "it never ends", ("training/test_state.py",),
    ),
]  # fmt: skip
