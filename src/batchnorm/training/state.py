"""Whether a state that was read can be that of a trainer: a damaged or forged one is refused before anything changes.

A trainer's own state is the model of what may come: the same keys, types, shapes and dtypes; and what the configuration
determines has the same values.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from pydantic import ValidationError
from torch import Tensor

from batchnorm.records import Evaluation, Result
from batchnorm.training.checkpoint import CheckpointError


class StateError(ValueError):
    """A state that cannot be a trainer's; the message names the key."""


@contextmanager
def refused(job: str) -> Iterator[None]:
    """Turn a StateError within the block into a CheckpointError of the network `job`."""
    try:
        yield
    except StateError as error:
        raise CheckpointError(
            f"the checkpoint of {job} does not fit the network: delete it, or use a new folder ({error})"
        ) from None


def check_progress(state: Mapping[str, object], own: Mapping[str, object], steps: int) -> int:
    """The step of `state`, whose keys are those of `own`, in a run of `steps`. Raises: StateError."""
    if state.keys() != own.keys():
        raise StateError("it has other keys")
    step = check_number(state["step"], 0, steps, "step")
    check_number(state["losses"], 0, step, "losses")
    check_number(state["seconds"], 0.0, sys.float_info.max, "seconds")
    return step


def check_form(state: object, like: object, key: str) -> None:
    """Raise StateError unless `state` has the types, keys, lengths, shapes and dtypes of `like`.

    Where `like` has an empty dict, any of texts may come.
    """
    if like == {}:
        if not isinstance(state, Mapping) or not all(
            isinstance(each, str) for pair in state.items() for each in pair
        ):
            raise StateError(f"{key} is no dict of texts")
    elif isinstance(like, Mapping):
        if not isinstance(state, Mapping) or state.keys() != like.keys():
            raise StateError(f"{key} has other keys")
        for name, value in like.items():
            check_form(state[name], value, f"{key}.{name}")
    elif isinstance(like, list | tuple):
        if type(state) is not type(like) or len(state) != len(like):
            raise StateError(f"{key} is no list of {len(like)}")
        for place, (value, expected) in enumerate(zip(state, like, strict=True)):
            check_form(value, expected, f"{key}[{place}]")
    elif isinstance(like, Tensor):
        if not isinstance(state, Tensor) or (state.shape, state.dtype) != (like.shape, like.dtype):
            raise StateError(f"{key} is no tensor of {tuple(like.shape)}, {like.dtype}")
    elif type(state) is not type(like) or (isinstance(state, float) and not math.isfinite(state)):
        raise StateError(f"{key} is {state!r}, where {type(like).__name__} is expected")


def check_number(state: object, low: float, high: float, key: str) -> int:
    """`state`, a number from `low` to `high`, an int if `high` is one. Raises: StateError."""
    kinds = (int,) if isinstance(high, int) else (int, float)
    if type(state) not in kinds or not low <= state <= high:  # type: ignore[operator]
        raise StateError(f"{key} is {state!r}, which is not within {low:,} to {high:,}")
    return state  # type: ignore[return-value]


def check_random(states: object, like: list[Tensor], key: str) -> None:
    """Raise StateError unless `states` are those of random generators: the CPU's first, perhaps a device's.

    A run that began on a device may go on without it, and the other way round.
    """
    if not isinstance(states, list) or not states:
        raise StateError(f"{key} is no list of states")
    both = min(len(states), len(like))
    check_form(states[:both], like[:both], key)
    try:
        torch.Generator().set_state(states[0])
    except RuntimeError:
        raise StateError(f"{key} is no state of a random generator") from None


def check_records(evaluations: object, result: object, job: str, step: int) -> None:
    """Raise StateError unless these are records, in JSON, of the network `job` at most up to `step`."""
    before = 0
    try:
        for line in list(evaluations):  # type: ignore[call-overload]
            evaluation = Evaluation.model_validate_json(line)
            if evaluation.job != job or not before < evaluation.step <= step:
                raise StateError(
                    f"evaluations are of {evaluation.job} at step {evaluation.step} after {before:,}"
                )
            before = evaluation.step
        if result is not None and Result.model_validate_json(result).steps != step:  # type: ignore[arg-type]
            raise StateError("the result is that of another step")
    except (TypeError, ValidationError):
        raise StateError("its records are none") from None


def check_optimizer(
    state: object,
    optimizer: torch.optim.Optimizer,
    rate: float,
    step: int,
    moments_of: Collection[str],
    key: str = "optimizer",
) -> None:
    """Raise StateError unless `state` is that of this optimizer after `step` steps, the learning rate now `rate`.

    moments_of: what it keeps for a parameter, apart from the number of its steps.
    """
    like = optimizer.state_dict()
    if not isinstance(state, Mapping) or state.keys() != like.keys():
        raise StateError(f"{key} has other keys")
    groups, moments = state["param_groups"], state["state"]
    check_form(groups, like["param_groups"], f"{key}.param_groups")
    for place, (group, expected) in enumerate(zip(groups, like["param_groups"], strict=True)):
        for name, value in expected.items():
            known = math.isclose(group[name], rate, rel_tol=1e-6) if name == "lr" else group[name] == value
            if not known:
                raise StateError(f"{key}.param_groups[{place}].{name} is {group[name]!r}, not {value!r}")
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    if not isinstance(moments, Mapping) or not moments.keys() <= set(range(len(parameters))):
        raise StateError(f"{key}.state has other parameters")
    for place, values in moments.items():
        where = f"{key}.state[{place}]"
        if not isinstance(values, Mapping) or not values.keys() <= {"step", *moments_of}:
            raise StateError(f"{where} has other keys")
        for name in moments_of:
            if (buffer := values.get(name)) is not None:
                check_form(buffer, parameters[place].detach(), f"{where}.{name}")
        if "step" in values:
            check_form(values["step"], torch.zeros(()), f"{where}.step")
            check_number(float(values["step"]), 0.0, float(step), f"{where}.step")
