"""`with watch(model, optimizer) as doctor`: what really happens to each layer in the steps of a training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.diagnostics.examine import Ignored, found_by, selected
from batchnorm.diagnostics.finding import Findings
from batchnorm.diagnostics.layer import batches_tracked
from batchnorm.diagnostics.measured import Arrival, LayerMeasured, Measured, analysis_of_variance, arrival
from batchnorm.diagnostics.runs import Runs, eagerly
from batchnorm.diagnostics.subject import Subject


@dataclass
class LayerSteps:
    """What happened to a layer in the steps.

    training, evaluation: calls in each mode, with gradients.
    without_gradient: calls in training mode without gradients, which move its statistics.
    recomputed: calls within a backward pass.
    counted: by how much its num_batches_tracked went up.
    calls: in training with gradients, in each step in which there were any.
    samples, values: the fewest of such a call: N, and N·|S|.
    ratios: of steps with several calls, how much more they differ than samples do (`analysis_of_variance`).
    """

    training: int = 0
    evaluation: int = 0
    without_gradient: int = 0
    recomputed: int = 0
    counted: int = 0
    calls: list[int] = field(default_factory=list)
    samples: int = 0
    values: int = 0
    ratios: list[float] = field(default_factory=list)

    @property
    def usual_calls(self) -> int:
        """The median of calls in a step."""
        return sorted(self.calls)[len(self.calls) // 2] if self.calls else 0

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return sorted(self.ratios)[len(self.ratios) // 2] if self.ratios else 0.0


@dataclass
class Steps:
    """What happened in a training.

    number: of steps of the optimizer; without one, of backward passes.
    layers: by path.
    """

    number: int = 0
    layers: dict[str, LayerSteps] = field(default_factory=dict)


class Doctor:
    """Watches the layers of a model while it is trained; the findings are of what happened.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8)).eval()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with bn.watch(model, optimizer) as doctor:
        ...     for _ in range(3):
        ...         model(torch.randn(32, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> [(each.code, each.message) for each in doctor.findings.of("warning")]
        [('BN305', 'all layers are in evaluation mode while the model is trained')]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        select: Sequence[str],
        ignore: Ignored,
        limit: int,
    ) -> None:
        self._chosen, self._patterns = selected(select, ignore)
        self._model, self._optimizer, self._limit = model, optimizer, limit
        self._subject = Subject(model, Runs(model, None, None, limit), optimizer)
        self.steps = Steps()
        self._measured = Measured()
        self._counts: dict[str, int] = {}  # of batches, when watching began
        self._arrived: defaultdict[str, list[Arrival]] = defaultdict(list)  # in this step
        self._stack: ExitStack | None = None
        self._behind = False  # a backward pass came since the last step

    def __enter__(self) -> Doctor:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin, or go on: for loops that no `with` can enclose, and hooks of trainers."""
        if self._stack is not None:
            return
        self._stack = ExitStack()
        self._stack.enter_context(eagerly(self._model))
        for path, layer in self._subject.layers.items():
            self.steps.layers.setdefault(path, LayerSteps())
            self._counts[path] = batches_tracked(layer) or 0
            before = layer.register_forward_pre_hook(lambda *_, path=path: self._enter(path))
            after = layer.register_forward_hook(
                lambda layer, arguments, named, made, path=path: self._leave(
                    path, layer, arguments, named, made
                ),
                with_kwargs=True,
            )
            self._stack.callback(before.remove)
            self._stack.callback(after.remove)
        if self._optimizer is not None:
            hook = self._optimizer.register_step_post_hook(lambda *_: self._end_step())
            self._stack.callback(hook.remove)

    def stop(self) -> None:
        """Take the hooks away; what was seen stays."""
        if self._stack is not None:
            self._stack.close()
            self._stack = None
            self._count()
            if self._behind or self._optimizer is None:
                self._end_step(counts=self._behind and self._optimizer is None)

    @property
    def findings(self) -> Findings:
        """What is found by what was seen until now, and of the model and the optimizer alone."""
        if self._stack is not None:
            self._count()
        subject = Subject(self._model, Runs(self._model, None, None, self._limit), self._optimizer)
        subject.steps = self.steps
        if self._measured.batches:
            subject.__dict__["measured"] = self._measured
        return found_by(self._chosen, subject, self._patterns)

    def lightning_callback(self) -> Any:
        """A callback of Lightning that watches the training of a Trainer; `findings` are here afterwards.

        Raises: ImportError where neither lightning nor pytorch_lightning is installed.
        """
        for name in ("lightning.pytorch", "pytorch_lightning"):
            with suppress(ImportError):
                return _callback(import_module(name).Callback, self)
        raise ImportError("neither lightning nor pytorch_lightning is installed: pip install lightning")

    def _enter(self, path: str) -> None:
        # a recomputation may end within the layer, as soon as all is there that was saved
        self.steps.layers[path].recomputed += _in_backward()

    def _count(self) -> None:
        """Add what the layers have counted since."""
        for path, layer in self._subject.layers.items():
            now = batches_tracked(layer) or 0
            self.steps.layers[path].counted += now - self._counts[path]
            self._counts[path] = now

    def _leave(self, path: str, layer: nn.Module, arguments: Any, named: Any, made: Any) -> None:
        x = arguments[0] if arguments else named.get("input")
        if not isinstance(x, Tensor) or x.dim() < 2 or not x.numel():
            return
        seen = self.steps.layers[path]
        if _in_backward():
            return
        if not torch.is_grad_enabled():
            seen.without_gradient += layer.training
            return
        if self._behind and self._optimizer is None and path == next(iter(self.steps.layers)):
            self._end_step()
        if not layer.training:
            seen.evaluation += 1
        else:
            seen.training += 1
            values = x.numel() // x.shape[1]
            seen.samples = min(seen.samples or x.shape[0], x.shape[0])
            seen.values = min(seen.values or values, values)
            if self.steps.number < self._limit:
                self._arrived[path].append(arrival(self.steps.number, x.detach()))
            else:
                self._arrived[path].append(_NOT_LOOKED_AT)
        if isinstance(made, Tensor) and made.requires_grad:
            made.register_hook(self._note_backward)

    def _note_backward(self, _: Tensor) -> None:
        self._behind = True

    def _end_step(self, counts: bool = True) -> None:
        self._behind = False
        for path, calls in self._arrived.items():
            seen = self.steps.layers[path]
            seen.calls.append(len(calls))
            known = [each for each in calls if each is not _NOT_LOOKED_AT and each.finite]
            spoiled = [each.batch for each in calls if each is not _NOT_LOOKED_AT and not each.finite]
            self._measured.spoiled.setdefault(path, []).extend(spoiled)
            if len(known) > 1:
                seen.ratios.append(analysis_of_variance([each.means for each in known]))
            if known:
                eps = float(self._subject.layers[path].eps)
                self._measured.layers.setdefault(path, LayerMeasured(eps)).arrivals += known
            if path not in self._measured.order:
                self._measured.order.append(path)
        if self._arrived:
            self._measured.batches += 1
            self._measured.live = True
        self._arrived.clear()
        self.steps.number += counts


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _callback(base: Any, doctor: Doctor) -> Any:
    """Of Lightning's class: watches each epoch of training, and not the validations in it."""

    def go_on(_: Any, trainer: Any, *__: object) -> None:
        if trainer.training:
            doctor.start()

    methods = {
        "on_train_epoch_start": lambda *_: doctor.start(),
        "on_validation_start": lambda *_: doctor.stop(),
        "on_validation_end": go_on,
        "on_train_epoch_end": lambda *_: doctor.stop(),
        "on_exception": lambda *_: doctor.stop(),
    }
    return type("BatchNormDoctor", (base,), methods)()


_NOTHING = torch.zeros(1, 1, dtype=torch.float64)
_NOT_LOOKED_AT = Arrival(-1, 0, 0, _NOTHING, _NOTHING, _NOTHING[0], _NOTHING[0], True, 0.0)


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    select: Sequence[str] = (),
    ignore: Ignored = (),
    limit: int = 8,
) -> Doctor:
    """Examine what really happens in the training steps inside of a `with`; nothing in them is changed.

    Found in addition to what `examine` finds: evaluation mode that was left on, statistics that move in passes without
    gradients, updates in recomputation, one layer on two domains in a step, accumulation of small micro-batches. Layers
    are seen by forward hooks: per call and layer one pass over its input in the first steps, and a few numbers after.

    Args:
        model: that is trained; in DDP too. What is compiled runs uncompiled meanwhile.
        optimizer: whose steps are counted; without it, backward passes are.
        select: as of `examine`.
        ignore: as of `examine`.
        limit: the number of steps whose batches are looked at.

    Returns: a Doctor: its `findings` when the block has ended, or before; `start()` and `stop()` in place of a `with`;
        `lightning_callback()` for a Trainer.

    Raises:
        ValueError: a code of no check.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> optimizer = torch.optim.SGD(bn.param_groups(model, 1e-4), lr=0.1)
        >>> with bn.watch(model, optimizer) as doctor:
        ...     for _ in range(3):
        ...         model(torch.randn(2, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> [(each.code, each.layer) for each in doctor.findings.of("warning")]
        [('BN402', '1')]
    """
    return Doctor(model, optimizer, select, ignore, limit)
