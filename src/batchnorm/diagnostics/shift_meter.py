"""`with bn.ShiftMeter(model, optimizer) as meter`: how the inputs of layers shift while a model is trained."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batchnorm.atomic_file import replacing
from batchnorm.diagnostics.distribution import Distribution, distribution
from batchnorm.diagnostics.gradient_shift import GradientShift, Loss, gradient_shifts
from batchnorm.diagnostics.layer import is_batch_norm
from batchnorm.diagnostics.runs import eagerly, unwrapped
from batchnorm.diagnostics.shift import Shift, Track
from batchnorm.diagnostics.shift_figure import MOST, draw, some_layers
from batchnorm.diagnostics.shift_table import table
from batchnorm.diagnostics.sites import Site, matching, sites
from batchnorm.graph.modules import is_compiled

_NAMES = ("15th", "50th", "85th")


class ShiftMeter:
    """Measures internal covariate shift while a model is trained; nothing of the training is changed.

    Every `every`-th step, beginning with the first, it looks at the input of each layer that is meant: the {15, 50, 85}
    percentiles of a typical unit, as in figure 1 (b, c) of Ioffe & Szegedy 2015, and of all units; how far mean and
    standard deviation of each channel have moved since the last look, in units of its own standard deviation; and what
    of that is the choice of examples alone. `gradient_shift` measures what Santurkar et al. 2018 mean by the term.

    The first call of a layer in the step is looked at, in training mode and not recomputed by activation checkpointing:
    of accumulated gradients the first micro-batch, of a layer that is called in turn the first time. Between the looks
    there is no hook but one that counts steps; in torch.compile what is compiled runs uncompiled for a step that is
    looked at. Each process of a distributed training sees its own batches. Masks are not known: padding counts.

    Percentiles are linear between values, as torch.quantile's: those of the whole batch where a channel has no more
    than max(256, 65,536 / C) values, otherwise of so many, evenly spread and the same each time, not random.

    `history` has all looks, `gradients` all gradient shifts, `latest` the last look at each layer by channel; `step`
    counts steps, and may be set when a training is resumed. What is printed of it is a table.

    Args:
        model: that is trained; in DistributedDataParallel too. Paths are those of the model inside.
        optimizer: whose steps are counted; None: forward passes of the model in training mode with gradients are, which
            a compiled model does not tell.
        layers: whose inputs are looked at, by path: a pattern as of file names, "layer4.*" (a dot is nothing special),
            or several. Meant are layers of batch normalization, in a model without any nonlinearities, and where it
            matches none of these any modules. None: all of the first kind that there is.
        every: steps from one look to the next.
        unit: the channel whose percentiles are shown; None: the one whose mean and deviation are nearest to the medians
            over channels at the first look.
        channels: the dimension of channels of the inputs; None: 1, and the last one for what comes from a Linear, an
            Embedding or a LayerNorm.

    Raises:
        ValueError: `every` is below 1; a pattern that no module matches; no layer to look at; a compiled model without
            its optimizer.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with bn.ShiftMeter(model, optimizer, every=10) as meter:
        ...     for _ in range(21):
        ...         model(torch.randn(32, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> [(each.step, each.layer, each.steps) for each in meter.history]
        [(0, '1', 0), (10, '1', 10), (20, '1', 10)]
        >>> low, median, high = meter.history[-1].percentiles
        >>> low < median < high
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        layers: str | Iterable[str] | None = None,
        *,
        every: int = 50,
        unit: int | None = None,
        channels: int | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is a number of steps, 1 or more, got {every!r}")
        self._model, _ = unwrapped(model)
        if optimizer is None and any(map(is_compiled, model.modules())):
            raise ValueError(
                "of a compiled model the steps are counted by its optimizer: ShiftMeter(model, optimizer)"
            )
        self._optimizer = None if optimizer is None else _innermost(optimizer)
        self._whole, self._every, self._unit = model, every, unit
        self._sites = sites(self._model, layers, channels)
        self._tracks = {each.path: Track(each.path, unit) for each in self._sites}
        self.step = 0
        self.history: list[Shift] = []
        self.gradients: list[GradientShift] = []
        self._written = 0, 0
        self._seen: dict[str, Distribution] = {}  # in this step
        self._running: ExitStack | None = None
        self._looking = ExitStack()
        self._inside = False  # of a forward pass of the model with gradients
        self._measuring = False  # gradients, by passes that are none of the training

    def __enter__(self) -> ShiftMeter:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin, or go on: for loops that no `with` can enclose, and hooks of trainers.

        Example:
            >>> import torch, batchnorm as bn
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
            >>> meter = bn.ShiftMeter(model, every=1)
            >>> meter.start()
            >>> _ = model(torch.randn(32, 4))
            >>> meter.stop()
            >>> meter.step
            1
        """
        if self._running is not None:
            return
        self._running = ExitStack()
        if self._optimizer is not None:
            end = torch.compiler.disable(self._end_step)  # the optimizer's step may be compiled itself
            hook = self._optimizer.register_step_post_hook(lambda *_: end())
        else:
            hook = self._model.register_forward_hook(Hook(self._end_forward))
        self._running.callback(hook.remove)
        self._look_if_due()

    def stop(self) -> None:
        """Take all hooks away; what was seen stays, but for a step that has not ended.

        Example:
            >>> import torch, batchnorm as bn
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
            >>> with bn.ShiftMeter(model) as meter:
            ...     meter.stop()
            >>> meter.history
            []
        """
        if self._running is not None:
            self._looking.close()
            self._running.close()
            self._running = None
            self._seen.clear()

    @property
    def latest(self) -> dict[str, Distribution]:
        """The last look at each layer, by path: `mean` and `variance` (C,), `percentiles` (3, C), in float64."""
        return {path: each.last for path, each in self._tracks.items() if each.last is not None}

    def gradient_shift(self, loss: Loss, layers: str | Iterable[str] | None = None) -> list[GradientShift]:
        """Measure how the gradient of each layer changes when the layers before it are updated.

        That is ‖G - G'‖ of Santurkar et al. 2018, definition 2.1: both are gradients of the loss of one batch for the
        layer's parameters; of G all parameters are as they are, of G' those of the layers before it are as the
        optimizer would make them by this batch. Before it are those whose first call is before its own.

        It costs L forward and backward passes of the loss for L layers, one more if the first layer is not among them,
        and a copy of the parameters and of the optimizer's state; so name `layers`, or call it seldom. Call it between
        two steps. Parameters, buffers, gradients, modes, random numbers and the optimizer are as before afterwards.
        Clipping and scaling of gradients are not known to it; in DistributedDataParallel call it in every process.

        Args:
            loss: called without arguments, gives the loss of one batch, the same each time: of the model in training
                mode, and in its autocast if there is one.
            layers: patterns of paths; None: the layers that have a parameter of two dimensions or more.

        Returns: a GradientShift for each layer, in the order of their calls; they are in `gradients` too.

        Raises:
            ValueError: the meter has no optimizer; a pattern that matches no layer with parameters; hooks of parameters
                that act in a backward pass, as an optimizer that steps there.

        Example:
            >>> import torch, batchnorm as bn
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
            >>> meter = bn.ShiftMeter(model, torch.optim.SGD(model.parameters(), lr=0.1))
            >>> x, y = torch.randn(32, 4), torch.randn(32, 1)
            >>> first, last = meter.gradient_shift(lambda: (model(x) - y).square().mean())
            >>> first.layer, first.shift, last.layer, last.shift > 0
            ('0', 0.0, '2', True)
        """
        if self._optimizer is None:
            raise ValueError("the update is that of an optimizer: ShiftMeter(model, optimizer)")
        patterns = [layers] if isinstance(layers, str) else layers
        self._measuring = True
        try:
            with eagerly(self._whole):
                found = gradient_shifts(self._model, self._optimizer, loss, patterns, self.step)
        finally:
            self._measuring = False
        self.gradients += found
        return found

    def write(self, writer: Any) -> None:
        """Write what has come since the last call as scalars of TensorBoard.

        Args:
            writer: a SummaryWriter, or whatever else has its add_scalar(tag, value, step).

        Example:
            >>> import torch, batchnorm as bn
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
            >>> with bn.ShiftMeter(model, every=1) as meter:
            ...     _ = model(torch.randn(32, 4))
            >>> class Writer:
            ...     def add_scalar(self, tag, value, step):
            ...         print(tag)
            >>> meter.write(Writer())
            input of 1/unit 15th percentile
            input of 1/unit 50th percentile
            input of 1/unit 85th percentile
            input of 1/layer 15th percentile
            input of 1/layer 50th percentile
            input of 1/layer 85th percentile
            input moved in widths/1
        """
        looks, shifts = self._written
        for row in self.history[looks:]:
            values: dict[str, float | None] = {}
            for what, percentiles in (("unit", row.percentiles), ("layer", row.layer_percentiles)):
                for name, value in zip(_NAMES, percentiles, strict=True):
                    values[f"input of {row.layer or 'the model'}/{what} {name} percentile"] = value
            if row.steps:
                values["input drift of mean"] = row.mean_drift
                values["input drift of std"] = row.std_drift
            values["input moved in widths"] = row.moved
            _add(writer, values, row.layer, row.step)
        for each in self.gradients[shifts:]:
            values = {
                "gradient norm": each.norm,
                "gradient shift": each.shift,
                "gradient cosine": each.cosine,
            }
            _add(writer, values, each.layer, each.step)
        self._written = len(self.history), len(self.gradients)

    def as_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Give all of it as JSON takes it; a number that is not finite as a word.

        Returns: "shifts" and "gradients", a list of dicts each, with the fields of `history` and `gradients`.

        Example:
            >>> import torch, batchnorm as bn
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
            >>> with bn.ShiftMeter(model, every=1) as meter:
            ...     _ = model(torch.randn(32, 4))
            >>> meter.as_dict()["shifts"][0]["layer"]
            '1'
        """
        return {
            "shifts": [_as_json(vars(each)) for each in self.history],
            "gradients": [_as_json(vars(each)) for each in self.gradients],
        }

    def save(self, path: str | Path) -> None:
        """Write all of it as JSON lines, each with its "kind": shift or gradient; a file is replaced as a whole.

        Args:
            path: of the file; its folder is made.

        Example:
            >>> import json, pathlib, tempfile, torch, batchnorm as bn
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
            >>> with bn.ShiftMeter(model, every=1) as meter:
            ...     _ = model(torch.randn(32, 4))
            >>> file = pathlib.Path(tempfile.mkdtemp(), "shift.jsonl")
            >>> meter.save(file)
            >>> [json.loads(line)["kind"] for line in file.read_text().splitlines()]
            ['shift']
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = self.as_dict()
        rows = [{"kind": kind[:-1]} | row for kind in ("shifts", "gradients") for row in found[kind]]
        with replacing(path) as unfinished:
            unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def figure(self, path: str | Path, layers: str | Iterable[str] | None = None) -> None:
        """Draw the percentiles of the unit of each layer over the steps: figure 1 (b, c) of the paper, of this network.

        Args:
            path: of the file, .png or .svg.
            layers: patterns of paths, of 12 layers at most; None: all, or of more than four the first, the last and two
                in between.

        Raises:
            ValueError: another suffix; nothing was looked at; a pattern that no layer matches; more than 12 layers.
            ImportError: says what to install: matplotlib, or what else a figure needs.

        Example:
            >>> import tempfile, torch, batchnorm as bn
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
            >>> with bn.ShiftMeter(model, every=1) as meter:
            ...     for _ in range(3):
            ...         _ = model(torch.randn(32, 4))
            >>> meter.figure(tempfile.mkdtemp() + "/shift.png")
        """
        path = Path(path)
        if path.suffix not in (".png", ".svg"):
            raise ValueError(f"a figure is a .png or .svg file, got {path.name!r}")
        by_layer = self._by_layer()
        if not by_layer:
            raise ValueError("nothing was looked at yet: train inside of `with meter`")
        if layers is None:
            shown = some_layers(list(by_layer))
        else:
            patterns = [layers] if isinstance(layers, str) else list(layers)
            for pattern in patterns:
                if not matching(pattern, by_layer):
                    raise ValueError(f"no layer has a path like {pattern!r}: there are {', '.join(by_layer)}")
            shown = [each for each in by_layer if any(matching(pattern, [each]) for pattern in patterns)]
        if len(shown) > MOST:
            raise ValueError(f"a figure shows {MOST} layers at most, these are {len(shown)}")
        normalized = any(map(is_batch_norm, self._model.modules()))
        draw(path, {each: by_layer[each] for each in shown}, "bn" if normalized else "plain")

    def __str__(self) -> str:
        return table(self._by_layer(), self.step)

    __repr__ = __str__

    def _by_layer(self) -> dict[str, list[Shift]]:
        """The looks at each layer, in the order of the model."""
        found: dict[str, list[Shift]] = {each.path: [] for each in self._sites}
        for row in self.history:
            found[row.layer].append(row)
        return {path: rows for path, rows in found.items() if rows}

    def _look_if_due(self) -> None:
        if self.step % self._every:
            return
        looking = ExitStack()
        looking.enter_context(eagerly(self._whole))
        hooks = [
            self._model.register_forward_pre_hook(Hook(self._enter)),
            # also after an error, or a pass in evaluation would be taken for one in training
            self._model.register_forward_hook(Hook(self._leave), always_call=True),
            *(
                each.module.register_forward_pre_hook(Hook(self._look_at(each)), with_kwargs=True)
                for each in self._sites
            ),
        ]
        for hook in hooks:
            looking.callback(hook.remove)
        self._looking = looking

    def _enter(self, *_: object) -> None:
        self._inside = self._in_training()

    def _leave(self, *_: object) -> None:
        self._inside = False

    def _in_training(self) -> bool:
        """Whether a call that begins now belongs to the forward pass of a training step."""
        recomputed = torch._C._current_graph_task_id() != -1
        # reentrant checkpointing turns gradients off inside of a pass that has them
        return self._model.training and not recomputed and (torch.is_grad_enabled() or self._inside)

    def _look_at(self, site: Site) -> Callable[[Any, Any, Any], None]:
        def look(_: Any, arguments: Any, named: Any) -> None:
            if self._measuring or site.path in self._seen or not self._in_training():
                return
            tensors = (each for each in tree_leaves((arguments, named)) if isinstance(each, Tensor))
            x = next((each for each in tensors if each.is_floating_point()), None)
            if x is None or x.dim() < 2 or not x.numel():
                return
            found = distribution(x, site.dim)
            if self._unit is not None and not 0 <= self._unit < len(found.mean):
                raise ValueError(
                    f"the input of {site.path!r} has {len(found.mean)} channels, no unit {self._unit}"
                )
            self._seen[site.path] = found

        return look

    def _end_forward(self, *_: object) -> None:
        if not self._measuring and self._in_training():
            self._end_step()

    def _end_step(self) -> None:
        for path, found in self._seen.items():
            self.history.append(self._tracks[path].add(self.step, found.settled()))
        self._seen.clear()
        self._looking.close()
        self.step += 1
        self._look_if_due()


class Hook:
    """A hook that does nothing in a copy of the model: not of this training, and not for a pickle to lead here."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self._function = function

    def __call__(self, *given: Any) -> None:
        if self._function is not None:
            self._function(*given)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def _innermost(optimizer: Any) -> Any:
    """The optimizer inside of wrappers, as accelerate's, which have no hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def _add(writer: Any, values: Mapping[str, float | None], layer: str, step: int) -> None:
    for name, value in values.items():
        if value is not None:
            writer.add_scalar(name if "/" in name else f"{name}/{layer or 'the model'}", value, step)


def _as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(each) for each in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return {name: plain(value) for name, value in row.items()}
