"""The seven changes of section 4.2.1, by which the paper accelerates networks with batch normalization, as data.

    changed, applied = recipe.apply(config, "bn-x5")
    for line in applied: print(line)

Each step changes one key of any configuration. `applied` reports each change, and each key that had the value already
or does not exist. Leaving a step out (`without`) gives an ablation, which the paper does not print.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from batchnorm.training.config import Config
from batchnorm.training.toml import literal

# The factors that the paper gives.
L2_FACTOR = 5
DECAY_FACTOR = 6


@dataclass(frozen=True)
class Step:
    """One change: its number and quotation from section 4.2.1, the key that it sets, and the new value.

    value: computes the new value from the configuration; None if the key does not exist or is not set.
    """

    number: int
    name: str
    quote: str
    key: str
    value: Callable[[Config], Any]


@dataclass(frozen=True)
class Variant:
    """One of the networks of section 4.2.2.

    rate: factor on Inception's learning rate.

    steps: whether the seven changes are made; BN-Baseline is Inception with BN and nothing else.
    """

    name: str
    rate: float = 1.0
    steps: bool = True
    batch_norm: bool = True
    activation: str | None = None


@dataclass(frozen=True)
class Applied:
    """The effect of a step, or of the variant itself, on one key. `before` equals `after` if it did not change."""

    what: str
    key: str
    before: Any
    after: Any
    note: str = ""

    @property
    def changed(self) -> bool:
        """Whether the value differs."""
        return bool(self.before != self.after)

    def __str__(self) -> str:
        if not self.changed:
            return f"{self.what}: {self.note or f'{self.key} is {_toml(self.before)} already'}"
        return f"{self.what}: {self.key} = {_toml(self.before)} → {_toml(self.after)}"


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("inception", steps=False, batch_norm=False),
        Variant("bn-baseline", steps=False),
        Variant("bn-x5", rate=5),
        Variant("bn-x30", rate=30),
        Variant("bn-x5-sigmoid", rate=5, activation="sigmoid"),
    )
}


def steps(rate_factor: float) -> tuple[Step, ...]:
    """The seven changes of section 4.2.1, in the paper's order; only the first depends on the variant."""
    return (
        Step(
            1,
            "higher learning rate",
            "Increase learning rate.",
            "optimizer.rate",
            lambda c: c.optimizer.rate * rate_factor,
        ),
        Step(
            2, "no dropout", "Remove Dropout.", "model.dropout", lambda c: _unless_none(c.model.dropout, 0.0)
        ),
        Step(
            3,
            "less L2",
            "Reduce the L2 weight regularization [...] by a factor of 5.",
            "optimizer.weight_decay",
            lambda c: c.optimizer.weight_decay / L2_FACTOR,
        ),
        Step(
            4,
            "faster decay",
            "Accelerate the learning rate decay [...] 6 times faster.",
            "optimizer.decay_every",
            lambda c: max(1, round(c.optimizer.decay_every / DECAY_FACTOR)),
        ),
        Step(
            5,
            "no LRN",
            "Remove Local Response Normalization.",
            "model.local_response_norm",
            lambda c: _unless_none(getattr(c.model, "local_response_norm", None), False),
        ),
        Step(
            6,
            "more thorough shuffling",
            "Shuffle training examples more thoroughly [...] within-shard shuffling.",
            "data.shuffle",
            lambda c: "within-shards",
        ),
        Step(
            7,
            "less photometric distortion",
            "Reduce the photometric distortions.",
            "data.distortion",
            lambda c: "reduced" if c.data.distortion == "full" else c.data.distortion,
        ),
    )


def apply(config: Config, variant: str, without: Collection[int] = ()) -> tuple[Config, list[Applied]]:
    """`config` changed to the `variant` of the paper (a name in `VARIANTS`), and the changes in order.

    config: that of the variant "inception"; the other variants multiply its rate.
    without: numbers of the steps of section 4.2.1 to leave out, 1 to 7.

    Raises: ValueError for an unknown variant or step, and for a step left out of a variant that has no steps.
    """
    if variant not in VARIANTS:
        raise ValueError(f"no recipe {variant!r}: choose from {', '.join(VARIANTS)}")
    if unknown := sorted(set(without) - set(range(1, 8))):
        raise ValueError(f"no step {unknown[0]} in section 4.2.1: they are 1 to 7")
    chosen = VARIANTS[variant]
    if without and not chosen.steps:
        raise ValueError(f"{variant} makes none of the seven changes: there is nothing to leave out")
    applied = []
    for key, value in (("batch_norm", chosen.batch_norm), ("activation", chosen.activation)):
        if value is not None:
            config, change = _change(
                config, variant, f"model.{key}", _unless_none(getattr(config.model, key, None), value)
            )
            applied.append(change)
    for step in steps(chosen.rate) if chosen.steps else ():
        what = f"{step.number}. {step.name}"
        if step.number in without:
            key = step.key
            applied.append(Applied(what, key, None, None, "left out"))
            continue
        config, change = _change(config, what, step.key, step.value(config))
        applied.append(change)
    return config, applied


def _change(config: Config, what: str, key: str, value: Any) -> tuple[Config, Applied]:
    section, name = key.split(".")
    part = getattr(config, section)
    before = getattr(part, name, None)
    if value is None:
        model = config.model.name
        note = f"{key} is not set, {model} keeps its own" if hasattr(part, name) else f"{model} has no {name}"
        return config, Applied(what, key, before, before, note)
    return config.with_values(section, **{name: value}), Applied(what, key, before, value)


def _unless_none(current: Any, value: Any) -> Any:
    """`value`, or None where the model has no `current` value."""
    return None if current is None else value


def _toml(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else literal(value)
