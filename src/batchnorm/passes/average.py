"""`average(model, decay)`: a model whose weights are the average of another's, with running statistics that fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchnorm.graph.modules import has_statistics, refuse_lazy
from batchnorm.passes.estimate import PopulationReport, measurable, population

Statistics = Literal["copied", "averaged", "measured"]
Decay = float | Callable[[int], float] | None


def average(model: nn.Module, decay: Decay = 0.999, *, statistics: Statistics = "copied") -> Average:
    """A copy of `model` whose parameters become the average of the model's at each `update_parameters`.

        decay = d       average ← d · average + (1 - d) · parameter          EMA
        decay = None    the mean of all that was seen                        SWA (Izmailov et al. 2018)

    As of `torch.optim.swa_utils.AveragedModel`, whose names it has, the first update copies. Tensors are matched by
    name. Integers and all buffers but running statistics are copied. Parameters in float16 and bfloat16 are averaged in
    float32, since in their own precision a small share of a difference is lost.

    The running statistics that a model collects are those of weights that it had. What the average has for its own:

        "copied"      the model's; fine for an EMA that stays close to it
        "averaged"    averages of the means, and of the variances by the law of total variance, by the same decay
        "measured"    those that `average.measure(batches)` finds, by `bn.population`; evaluation before that is refused

    Args:
        model: any module; wrapped in DistributedDataParallel or compiled, it is what is inside. Lazy layers must have
            seen a batch.
        decay: between 0 and 1; or None; or a function of the number of updates before, which gives it.
        statistics: see above.

    Returns: an Average, in evaluation mode, without gradients.

    Raises:
        ValueError: a decay out of range, unknown statistics, or lazy layers.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        >>> ema = bn.average(model, decay=0.9, statistics="measured")
        >>> for step in range(3):
        ...     # loss.backward(); optimizer.step()
        ...     ema.update_parameters(model)
        >>> report = ema.measure([torch.randn(64, 4) for _ in range(8)])
        >>> ema(torch.randn(2, 4)).shape
        torch.Size([2, 4])
    """
    return Average(model, decay, statistics)


class Average(nn.Module):
    """What `average` makes. Its `module` is the averaged model; `n_averaged` counts the updates."""

    n_averaged: Tensor
    is_measured: Tensor

    def __init__(self, model: nn.Module, decay: Decay, statistics: Statistics) -> None:
        super().__init__()
        if statistics not in ("copied", "averaged", "measured"):
            raise ValueError(f'statistics must be "copied", "averaged" or "measured", got {statistics!r}')
        if isinstance(decay, int | float) and not 0 <= decay <= 1:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        inner = _inner(model)
        refuse_lazy(inner)
        self.module = copy.deepcopy(inner).requires_grad_(False)
        self.decay, self.statistics = decay, statistics
        device = next((each.device for each in self.module.parameters()), None)
        self.register_buffer("n_averaged", torch.tensor(0, device=device))
        self.register_buffer("is_measured", torch.tensor(True, device=device))
        self.exact = nn.Module()  # float32 averages of parameters of less
        self._keep_exact()
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.statistics == "measured" and not self.training and not bool(self.is_measured):
            raise RuntimeError(
                'the running statistics are not yet those of the averaged weights (statistics="measured"): call '
                "measure(batches) first"
            )
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the present values of the model into the average.

        Args:
            model: the one that is trained, wrapped or not.

        Raises:
            ValueError: its tensors have other names or shapes than the average's; then nothing has changed.

        Example:
            >>> import torch, batchnorm as bn
            >>> model = torch.nn.Linear(4, 4)
            >>> mean = bn.average(model, decay=None)
            >>> mean.update_parameters(model)
            >>> mean.n_averaged.item()
            1
        """
        inner = _inner(model)
        own, new = _tensors(self.module), _tensors(inner)
        if own.keys() != new.keys():
            different = sorted(own.keys() ^ new.keys())
            raise ValueError(f"this is not the model that is averaged: {', '.join(different[:3])} differ")
        for name, tensor in own.items():
            if tensor.shape != new[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(new[name].shape)}, and its average {tuple(tensor.shape)}"
                )
        share = self._share()
        self._keep_exact()
        statistics = (
            self._average_statistics(inner, share) if self.statistics == "averaged" else self._measured()
        )
        parameters = dict(self.module.named_parameters())
        averaged: list[tuple[Tensor, Tensor]] = []
        for name, tensor in own.items():
            if name in statistics:
                continue
            value = new[name].detach().to(tensor.device)
            exact = self.exact._buffers.get(_key(name))
            if (
                share == 1
                or name not in parameters
                or not (tensor.is_floating_point() or tensor.is_complex())
            ):
                tensor.copy_(value)
                if exact is not None:
                    exact.copy_(value)
            elif exact is not None:
                exact.lerp_(value.float(), share)
                tensor.copy_(exact)
            else:
                averaged.append((tensor, value.to(tensor.dtype)))
        if averaged:
            torch._foreach_lerp_([one for one, _ in averaged], [other for _, other in averaged], share)
        self.n_averaged += 1
        if statistics and self.statistics == "measured":
            self.is_measured.fill_(False)

    def measure(self, batches: Iterable[Any], **options: Any) -> PopulationReport:
        """Measure the running statistics of the averaged weights.

        Args:
            batches: as for `bn.population`.
            options: as for `bn.population`.

        Returns: its report.

        Example:
            >>> import torch, batchnorm as bn
            >>> mean = bn.average(torch.nn.Sequential(torch.nn.BatchNorm1d(4)), decay=None)
            >>> mean.measure([torch.randn(64, 4)]).count("measured")
            1
        """
        report = population(self.module, batches, **options)
        self.is_measured.fill_(True)
        return report

    def extra_repr(self) -> str:
        return f"decay={self.decay}, statistics={self.statistics!r}"

    def _measured(self) -> set[str]:
        """The names of the statistics that `measure` will find; those of frozen layers, say, are copied."""
        if self.statistics != "measured":
            return set()
        return {name for path in measurable(self.module) for name in _statistics_of(path)}

    def _keep_exact(self) -> None:
        """Have a float32 average of each parameter of less precision, also where one was cast or loaded since."""
        for name, parameter in self.module.named_parameters():
            exact = self.exact._buffers.get(_key(name))
            if parameter.dtype not in (torch.float16, torch.bfloat16):
                self.exact._buffers.pop(_key(name), None)
            elif (
                exact is None
                or exact.dtype != torch.float32
                or not torch.equal(exact.to(parameter), parameter)
            ):
                self.exact.register_buffer(_key(name), parameter.detach().float())

    def _share(self) -> float:
        """How much of the new values goes into the average."""
        number = int(self.n_averaged)
        if number == 0:
            return 1.0
        if self.decay is None:
            return 1 / (number + 1)
        decay = self.decay(number) if callable(self.decay) else self.decay
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be between 0 and 1, got {decay} for update {number}")
        return 1 - decay

    def _average_statistics(self, model: nn.Module, share: float) -> set[str]:
        """Average the running statistics; return their names."""
        found: set[str] = set()
        theirs: dict[str, Any] = dict(model.named_modules())
        for path, layer in self.module.named_modules():
            if not has_statistics(layer):
                continue
            own: Any = layer
            mean, variance = own.running_mean.double(), own.running_var.double()
            new_mean = theirs[path].running_mean.to(mean)
            new_variance = theirs[path].running_var.to(variance)
            spread = share * (1 - share) * (new_mean - mean).square()
            own.running_mean.copy_(mean.lerp(new_mean, share))
            own.running_var.copy_(variance.lerp(new_variance, share) + spread)
            found |= _statistics_of(path)
        return found


def _inner(model: Any) -> nn.Module:
    """The model that is wrapped."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"average takes a torch.nn.Module, not {type(model).__name__}")
    inner: nn.Module = model
    while True:
        if isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = inner.module
        elif isinstance(inner, torch._dynamo.OptimizedModule):
            inner = inner._orig_mod
        else:
            return inner


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _statistics_of(path: str) -> set[str]:
    """The names of a layer's running statistics."""
    return {f"{path}.{name}".removeprefix(".") for name in ("running_mean", "running_var")}


def _key(name: str) -> str:
    return name.replace(".", "/")
