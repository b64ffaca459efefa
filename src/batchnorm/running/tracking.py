"""A layer's running statistics: what they follow, in which domain, and how they are moved, loaded and reset."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from batchnorm.kernels.call import Call
from batchnorm.kernels.observers import captured, transformed
from batchnorm.layer_path import forget_name, qualified_name
from batchnorm.running.buffers import (
    RunningStatistics,
    apply_widely,
    establish,
    flat,
    rate_of_next,
    untouched,
    widen,
)
from batchnorm.running.domain import active


class Tracking(nn.modules.batchnorm._BatchNorm):
    """torch's layer as far as running statistics go; see docs/numerics.md for what they are."""

    # no buffer: neither state_dict() nor buffers() has others than torch's layers have
    num_batches_skipped: Tensor | None = None
    domains: nn.ModuleDict
    follows: bool = True  # whether training batches move running statistics; see passes/paused.py
    given: bool = False  # whether running statistics have come from elsewhere since the last batch
    _warned_of_skipped: bool = False
    _single_batches: int = 0
    debiased: bool = False
    on_single: Literal["raise", "running"] = "raise"

    def _begin_tracking(self) -> None:
        """What torch's constructor leaves to do, and a layer of torch's lacks."""
        widen(self)
        mean = self.running_mean
        self.num_batches_skipped = (
            None if mean is None else torch.zeros((), dtype=torch.long, device=mean.device)
        )
        self._warned_of_skipped = self.given = False
        self._single_batches = 0

    def __getstate__(self) -> dict[str, Any]:
        return forget_name(vars(self))

    def _follows_batches(self) -> bool:
        """Whether the next batch may enter the running statistics, by the layer's mode."""
        return self.training

    def active_statistics(self) -> Tracking | RunningStatistics:
        """The holder of the running statistics in use: the layer itself, or that of the active domain.

        A training batch in a new domain gets a new holder, which `add_domain` makes one of the layer's.
        """
        name = active()
        if name is None or self.running_mean is None:
            return self
        known = self._domains().get(name)
        if known is not None:
            return known
        if not self._follows_batches():
            names = ", ".join(self._domains()) or "none"
            raise RuntimeError(
                f"no running statistics of domain {name!r} (there are: {names}): "
                f"train on it, or adapt to it, within bn.domain({name!r}) first"
            )
        if transformed():
            raise RuntimeError(
                f"domain {name!r} cannot begin under torch.func's transforms: let a batch enter it before"
            )
        return RunningStatistics(self.running_mean, name)

    def add_domain(self, statistics: RunningStatistics) -> None:
        """Keep `statistics` as those of the domain they are named after, unless it has some."""
        if statistics.name not in self._domains():
            if "domains" not in self._modules:
                self.domains = nn.ModuleDict().train(self.training)
            self.domains[statistics.name] = statistics.train(self.training)

    def owns(self, statistics: Tracking | RunningStatistics) -> bool:
        """Whether `statistics` are the layer's own or those of one of its domains, not of a domain that may begin."""
        return statistics is self or statistics in self._domains().values()

    def has_domain(self, name: str | None) -> bool:
        """Whether the layer has running statistics of the domain called `name`."""
        return name is None or name in self._domains()

    def domain_names(self) -> list[str]:
        """The domains of which the layer has running statistics, beside its own."""
        return list(self._domains())

    def remove_domain(self, name: str) -> None:
        """Drop the running statistics called `name`, if there are any."""
        self._domains().pop(name, None)
        if not self._domains():
            self._modules.pop("domains", None)

    def set_num_batches_tracked(self, count: int) -> None:
        """Set how many batches the running statistics of the active domain stand for."""
        batches = self.active_statistics().num_batches_tracked
        if batches is not None:
            batches.fill_(count)

    def take_over(self) -> None:
        """Let the statistics of the active domain, which have come from elsewhere, be more than a beginning.

        An average that is debiased, or cumulative, would forget them at the first batch if it has seen none.
        """
        self.active_statistics().given = True

    def rate_of_next(self, statistics: Tracking | RunningStatistics) -> float | Tensor:
        """The weight of the next batch in `statistics`, see buffers.rate_of_next."""
        if statistics.given and (self.debiased or self.momentum is None) and not self._frozen():
            establish(statistics, self.momentum)
            if not torch.compiler.is_compiling():  # compiled code may not run now
                statistics.given = False
        return rate_of_next(self.momentum, statistics._buffers["num_batches_tracked"], self.debiased)

    def _domains(self) -> dict[str, RunningStatistics]:
        return cast(dict[str, RunningStatistics], getattr(self._modules.get("domains"), "_modules", {}))

    def running_statistics(self) -> tuple[Tensor, Tensor]:
        """The running mean and variance of the domain that is active, (C,) each; a new domain's begin as a layer's do.

        Raises: RuntimeError for a layer that keeps none.
        """
        name = active()
        if name is not None and self.running_mean is not None and not self.has_domain(name):
            self.add_domain(RunningStatistics(self.running_mean, name))
        mean, var = flat(self.active_statistics())
        if mean is None or var is None:
            raise RuntimeError(
                "this layer keeps no running statistics: make it with track_running_stats=True"
            )
        return mean, var

    def _count_skipped(self, call: Call) -> None:
        """Count the batch if it has not entered the running statistics, which `call` should have updated."""
        moments = call.batch_moments()
        if moments is None or call.updated is None:
            return
        skipped = ~torch.as_tensor(call.updated)
        if isinstance(moments.count, Tensor):
            skipped = skipped & (moments.count > 0).any()  # of padding alone it says nothing
        counter = self.num_batches_skipped
        if counter is None or captured() or transformed():
            return
        # a tracer's fake of what is no buffer does not exist
        if torch.compiler.is_dynamo_compiling() or type(skipped) is type(counter):
            counter.add_(skipped.to(counter.device))  # which only parameters and buffers may have left
            if skipped.device.type == "cpu":
                self._warn_of_skipped(skipped)

    def train(self, mode: bool = True) -> Self:
        """As torch's; where asking in every step would stall the device, this is where skipped batches warn."""
        if self.num_batches_skipped is not None:
            self._warn_of_skipped(self.num_batches_skipped)
        return super().train(mode)

    def _warn_of_skipped(self, skipped: Tensor) -> None:
        """Warn, once, if `skipped` is not 0, and if that can be asked for: not compiled, traced or mapped."""
        # compiling first: compiled code that had read the flag would be compiled again once it is set
        if torch.compiler.is_compiling() or self._warned_of_skipped:
            return
        self._warned_of_skipped = bool(_known(skipped))
        if self._warned_of_skipped:
            warnings.warn(
                f"layer {qualified_name(self)} saw a batch whose mean or variance is inf or nan: its running "
                "statistics keep their last good value. num_batches_skipped counts such batches; "
                "this warning is given once",
                RuntimeWarning,
                stacklevel=2,
            )

    def _warn_of_single(self, statistics: Tracking | RunningStatistics) -> None:
        """Warn, once, when a second batch of one value per channel comes to `statistics` that no batch has entered."""
        if torch.compiler.is_compiling() or self._single_batches > 1:
            return
        self._single_batches += 1
        if self._single_batches > 1 and _known(untouched(statistics)):
            warnings.warn(
                f"layer {qualified_name(self)} has seen only batches of one value per channel, which it normalises by "
                "running statistics that no batch has entered, a mean of 0 and a variance of 1: give it larger "
                "batches, or statistics (load_state_dict, bn.adapt); this warning is given once",
                RuntimeWarning,
                stacklevel=2,
            )

    def _frozen(self) -> bool:
        """Whether the running statistics stay as they are in training too."""
        return False

    def reset_running_stats(self) -> None:
        """As torch's, in every domain; also forget the batches that were skipped.

        A frozen layer keeps its statistics, and warns: no batch would ever replace them.
        """
        if self._frozen() and _known(untouched(self)) is False:
            warnings.warn(
                f"layer {qualified_name(self)} is frozen and keeps its running statistics: bn.unfreeze(model) first, "
                "if they are to be reset or estimated again (torch.optim.swa_utils.update_bn)",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        super().reset_running_stats()
        for statistics in self._domains().values():
            statistics.reset()
        self._forget_skipped()

    def _forget_skipped(self) -> None:
        skipped, mean = self.num_batches_skipped, self.running_mean
        if skipped is not None and mean is not None:
            if skipped.device != mean.device:  # the statistics were assigned to a layer on meta
                self.num_batches_skipped = skipped = torch.empty_like(skipped, device=mean.device)
            skipped.zero_()
            self._warned_of_skipped = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        apply_widely(self, lambda: super(Tracking, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        skipped = self.num_batches_skipped
        if skipped is not None:
            self.num_batches_skipped = fn(skipped)
            if skipped.is_meta:
                # what was materialised is arbitrary; no checkpoint brings the counter, and a frozen layer is not reset
                super().reset_running_stats()
                self._forget_skipped()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        state_dict, prefix = args[:2]
        if self.running_mean is not None:
            for name in sorted(_domains_in(state_dict, prefix).difference(self._domains())):
                self.add_domain(RunningStatistics(self.running_mean, name))
        super()._load_from_state_dict(*args)
        widen(self)  # load_state_dict(assign=True) takes the checkpoint's tensors as they are
        if f"{prefix}running_mean" in state_dict:
            self._forget_skipped()
            self.given = True


def _known(value: Tensor | None) -> bool | None:
    """A bool tensor's value; None where it has none, or none that can be asked for."""
    try:
        return None if value is None or value.is_meta else bool(value)
    except RuntimeError:
        return None


def _domains_in(state_dict: dict[str, Any], prefix: str) -> set[str]:
    """The names of the domains that a layer has in `state_dict`."""
    prefix += "domains."
    return {key.removeprefix(prefix).partition(".")[0] for key in state_dict if key.startswith(prefix)}
