"""`model, report = fold(model, *example_inputs)`: plan, prove and apply folds, in rounds, until none is left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from batchnorm.graph.modules import has_hooks, normalizes
from batchnorm.graph.observation import LAYOUT, REREAD, ModuleCall, Observation, behind_layout, observe
from batchnorm.graph.sources import NotLinear
from batchnorm.graph.trace import Untraceable, parameters
from batchnorm.graph.whole_trace import whole_trace
from batchnorm.passes.fold.branches import into_beside, joined
from batchnorm.passes.fold.following import into_following
from batchnorm.passes.fold.normalization import Left, Normalization
from batchnorm.passes.fold.packed import pack as pack_convolutions
from batchnorm.passes.fold.plan import PROVEN, Plan, Tensors
from batchnorm.passes.fold.preceding import into_preceding
from batchnorm.passes.fold.proof import Proof, as_dtype, copy_of, detached, difference, outputs
from batchnorm.passes.fold.remaining import as_scale
from batchnorm.passes.report import LayerReport, Report
from batchnorm.passes.save_memory import keep_outputs
from batchnorm.passes.upgrade import upgrade

Model = TypeVar("Model", bound=nn.Module)
State = dict[str, Tensor]

ALIKE = 1e-4  # of the largest output, where a part of the model computes in float32


@dataclass(frozen=True)
class FoldReport(Report):
    """The outcome for each normalization layer: "folded" and into what, "affine" or "left alone", and why.

    Args:
        layers: one for each layer.
        known: "traced" if what was seen holds for all inputs of these types, since nothing that the forward does
            depends on values or sizes; "observed" if it is known for inputs like the examples alone.
        error: the largest difference of an output from the model's, from the examples, in its own dtype, as a share of
            the largest output.
        parameters: numbers of parameters, before and after.
        operations: numbers of calls of torch's operators in a forward pass, layout changes left out, before and
            after.
        packed: the number of convolutions whose weights are in oneDNN's layout (`pack=True`).
        noise: by how much the model's own outputs change when its weights change by rounding, in float64: 1 where a
            detector sorts scores that are nearly equal. Then each fold is proven alone, and the whole says nothing.
    """

    known: Literal["observed", "traced"] = "observed"
    error: float = 0.0
    parameters: tuple[int, int] = (0, 0)
    operations: tuple[int, int] = (0, 0)
    packed: int = 0
    noise: float = 0.0

    @property
    def summary(self) -> str:
        """The number of layers with each outcome, and what the model was before and is after, in one line."""
        (before, after), (called, calls) = self.parameters, self.operations
        return (
            f"{super().summary} ({self.known}; outputs differ by {self.error:.1e}"
            f"{', as they do when weights are rounded' if self.noise > ALIKE else ''}; "
            f"{before:,} → {after:,} parameters, {called} → {calls} operations"
            f"{f', {self.packed} convolutions packed' if self.packed else ''})"
        )


@overload
def fold(
    model: Model,
    *inputs: Any,
    prove: bool = True,
    into: Literal["model"] = "model",
    borders: bool = False,
    pack: bool = False,
    **keywords: Any,
) -> tuple[Model, FoldReport]: ...
@overload
def fold(
    model: nn.Module,
    *inputs: Any,
    prove: bool = True,
    into: Literal["state_dict"],
    borders: bool = False,
    pack: bool = False,
    **keywords: Any,
) -> tuple[State, FoldReport]: ...
def fold(
    model: nn.Module,
    *inputs: Any,
    prove: bool = True,
    into: Literal["model", "state_dict"] = "model",
    borders: bool = False,
    pack: bool = False,
    **keywords: Any,
) -> tuple[nn.Module | State, FoldReport]:
    """A copy of `model` for evaluation without batch normalization, which computes the same.

        W·x + b, then s·y + t, is s·W·x + (s·b + t);   W·(s·x + t) + b is (W·s)·x + (W·t + b)

    Each layer is folded into the linear operations before it (convolution, transposed, grouped, linear; through layout
    changes, concatenation, sums, pooling and scales), else into one beside it that reads the same and to which it is
    added (RepVGG's and MobileOne's branches), else into those behind it where nothing is padded. What cannot be folded
    becomes one `Scale`: a factor and a term for each channel, with the activation after it. The layers may be torch's,
    timm's, ours, frozen ones of torchvision and detectron2, or of any class that in evaluation multiplies and shifts
    each channel.

    The model is not changed; a DistributedDataParallel or DataParallel around it is left out. The copy has its class,
    the names of its children and its forward; a folded layer's place is taken by an Identity, or by the activation
    that the layer has. Parametrizations of weights into which a layer is folded are computed once and removed.

    Args:
        model: any module; it is run in evaluation mode.
        inputs: of its forward, for example. What is folded holds for inputs with which the model calls its modules in
            the same order; the report says whether that is so for all.
        prove: that a fold is right is computed in float64: for each layer from random values, and for the whole model
            from the examples and from random numbers of their shapes, to 1e-9 of the largest value (1e-4 where a part
            of the model computes in float32 itself). One that is not is undone and named. False leaves that out.
        into: "state_dict" returns the weights of the copy instead.
        borders: whether a layer goes into a convolution behind it that pads with zeros, too. What its term brings there
            depends on the distance to the border: the convolution gets a map of it to add, which costs about what
            the `Scale` does that the layer becomes otherwise.
        pack: whether convolutions of images get weights in oneDNN's own layout, and compute the activation and the
            residual after them in the same call, for inference on a CPU in float32; best with inputs in channels-last
            memory. The copy is upgraded for that (`bn.upgrade`). It takes the memory of the weights twice.
        keywords: further inputs, by name.

    Returns: the copy in evaluation mode, in the dtype of `model`, and a `FoldReport`.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: the model is compiled, or returns no tensors by which a fold could be proven; `into` is something
            else. What its forward raises is passed on.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> folded, report = bn.fold(model, torch.randn(1, 3, 32, 32))
        >>> report["1"].outcome, report["1"].what, report.known
        ('folded', 'into 0', 'traced')
        >>> folded[1]
        Identity()
    """
    if not isinstance(cast(object, model), nn.Module):
        advice = f": pass an instance, {model.__name__}(...)" if isinstance(model, type) else ""
        raise TypeError(f"fold takes a torch.nn.Module, not {type(model).__name__}{advice}")
    if into not in ("model", "state_dict"):
        raise ValueError(f'into must be "model" or "state_dict", got {into!r}')
    if isinstance(model, DistributedDataParallel | nn.DataParallel):
        model = model.module  # the copy is for one device
    inputs, keywords = detached((inputs, keywords))
    with torch.inference_mode(False):
        copied = copy_of(model).eval()
        folded, report = _Folding(copied, inputs, keywords, prove, borders, pack).run()
    return (folded if into == "model" else folded.state_dict()), report


@dataclass
class _Round:
    """What was seen of the model as it is now, and the calls of its layers."""

    model: nn.Module
    seen: Observation
    tensor: Tensors
    layers: dict[str, list[Normalization]] = field(default_factory=dict)

    @property
    def paths(self) -> dict[nn.Module, str]:
        """The first path of each module."""
        return {module: path for path, module in self.model.named_modules()}

    def plans(self, make: _Make, leave: Callable[[str, str], None]) -> list[Plan]:
        """How each layer is folded so, if it can be."""
        found = []
        for path, calls in self.layers.items():
            try:
                found.append(make(self.model, calls, self.tensor))
            except (Left, NotLinear) as why:
                leave(path, str(why))
        return found


_Make = Callable[[nn.Module, list[Normalization], Tensors], Plan]
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class _Folding:
    """One folding: the model in float64, folded so far, and what became of each layer."""

    def __init__(
        self,
        original: nn.Module,
        inputs: tuple[Any, ...],
        keywords: dict[str, Any],
        prove: bool,
        borders: bool,
        pack: bool,
    ) -> None:
        self.borders, self.pack = borders, pack
        self.original, self.prove = original, prove  # never run: what a forward keeps would be copied with it
        self.inputs, self.keywords = inputs, keywords
        self.expected = outputs(copy.deepcopy(original), inputs, keywords)
        if prove and not self.expected:
            raise ValueError(
                f"{type(original).__name__} returns no tensors, by which a fold could be proven: wrap it in a module "
                "that returns some, or pass prove=False"
            )
        if pack:
            upgrade(original)
        self.names = [name for name, module in original.named_modules() if normalizes(module)]
        self.wide, self.given = self._widened()
        self.proof = Proof.of(self.wide, *self.given) if prove else None
        self.tolerance = PROVEN
        self.done: dict[str, LayerReport] = {}
        self.why: dict[str, dict[str, str]] = {}  # by path and kind of plan
        self.failed: set[tuple[str, str]] = set()  # plans that were undone, by path and kind
        self.applied: list[Plan] = []
        self.made_plain: dict[str, None] = {}
        self.folded_into: set[str] = set()
        self.goes_to: dict[str, tuple[str, ...]] = {}

    def run(self) -> tuple[nn.Module, FoldReport]:
        """Fold, and return the copy in the dtypes of the original."""
        given = self.inputs, self.keywords
        before = _operations(copy.deepcopy(self.original), given)
        self._compute_parametrizations()
        while self._one_round():
            pass
        folded, packed = self._packed(self._narrowed())
        after, found = _operations(copy.deepcopy(folded), given), outputs(copy.deepcopy(folded), *given)
        return folded, FoldReport(
            tuple(self._report(name) for name in self.names),
            "traced" if _is_traceable(self.original, *given) else "observed",
            difference(found, self.expected),
            (_size(self.original), _size(folded)),
            (before, after),
            packed,
            0.0 if self.proof is None else self.proof.noise,
        )

    def _widened(self) -> tuple[nn.Module, tuple[Any, Any]]:
        """The model and its inputs in float64, if it computes in that; else a copy as it is."""
        given = as_dtype((self.inputs, self.keywords), torch.float64)
        wide = _double(copy.deepcopy(self.original))
        try:
            outputs(wide, *given)
        except Exception:
            return copy.deepcopy(self.original), (self.inputs, self.keywords)
        return wide, given

    def _packed(self, folded: nn.Module) -> tuple[nn.Module, int]:
        """The model with packed convolutions, if that is wanted and computes the same, and their number."""
        if not self.pack:
            return folded, 0
        given = self.inputs, self.keywords
        packed = copy.deepcopy(folded)
        seen = _observed(copy.deepcopy(folded), given)
        number = pack_convolutions(packed, seen)
        seen.forget()
        try:
            right = difference(outputs(copy.deepcopy(packed), *given), self.expected) <= ALIKE
        except Exception:
            right = False
        return (packed, number) if right else (folded, 0)

    def _narrowed(self) -> nn.Module:
        """The same folds in a copy of the original, in its dtypes."""
        found = copy.deepcopy(self.original)
        keep_outputs(found)  # of a training
        for path in self.made_plain:
            _make_plain(found.get_submodule(path))
        for plan in self.applied:
            modules = {
                path: copy.deepcopy(module).to(_dtype_at(self.original, path))
                for path, module in plan.modules.items()
            }
            replace(plan, modules=modules).apply(found)
        return found.eval()  # what has taken a layer's place is new

    def _look(self) -> _Round:
        seen = _observed(self.wide, self.given)
        now = _Round(self.wide, seen, Tensors(self.wide, seen))
        made = {value.dtype for each in now.seen.operations for value in each.results}
        noise = self.proof.noise if self.proof is not None else 0.0
        noise = 10 * noise if noise < 0.1 else torch.inf  # of another number of boxes, say
        self.tolerance = max(ALIKE if made.intersection(_NARROW) else PROVEN, noise)
        calls: dict[str, list[ModuleCall]] = {}
        for call in now.seen.calls:
            if normalizes(call.module) and call.path in self.names:
                calls.setdefault(call.path, []).append(call)
        for path, each in calls.items():
            self.why.setdefault(path, {})
            try:
                now.layers[path] = [Normalization.of(call, now.tensor) for call in each]
            except Left as why:
                self._leave("", path, str(why))
        return now

    def _compute_parametrizations(self) -> None:
        """Make plain parameters of parametrized weights beside normalizations: their functions are constants now."""
        now = self._look()
        for calls in now.layers.values():
            for layer in calls:
                made = behind_layout(layer.value).producer
                near = [made, *(layer.output.users if layer.output is not None else [])]
                for module in {
                    each.call.module for each in near if each is not None and each.call is not None
                }:
                    if parametrize.is_parametrized(module) and not has_hooks(module):
                        _make_plain(module)
                        self.made_plain[now.paths[module]] = None

    def _one_round(self) -> bool:
        """Apply the plans of the first kind of which there are any. Returns whether there were any."""
        now = self._look()
        try:
            for kind, plans in self._kinds(now):
                new = _apart(plan for plan in plans if (plan.path, kind) not in self.failed)
                if self._apply_some(kind, new, now.tensor):
                    return True
            return False
        finally:
            now.seen.forget()

    def _kinds(self, now: _Round) -> Iterator[tuple[str, list[Plan]]]:
        """The plans of each kind, the best kind first."""

        def of(kind: str, make: _Make) -> tuple[str, list[Plan]]:
            return kind, now.plans(make, partial(self._leave, kind))

        yield of("before", into_preceding)
        yield of("beside", into_beside)
        yield of("behind", partial(into_following, borders=self.borders))
        yield "joined", list(joined(now.model, now.seen, now.tensor, self.folded_into))
        yield of("layer before", partial(into_preceding, normalizations=True))
        yield of("affine", lambda model, calls, tensor: as_scale(model, now.seen, calls, tensor))

    def _leave(self, kind: str, path: str, why: str) -> None:
        self.why.setdefault(path, {})[kind] = why

    def _apply_some(self, kind: str, plans: list[Plan], tensor: Tensors) -> bool:
        """Apply those that are right. Returns whether there were any."""
        right = []
        for plan in plans:
            if self.prove and not (error := plan.error(tensor)) <= PROVEN:
                self._undo(kind, plan, f"would change what follows by {error:.1e}")
            else:
                right.append(plan)
        if not right:
            return False
        together = self._with(right)
        if self._error(together) <= self.tolerance:
            self.wide = together
            for plan in right:
                self._note(kind, plan)
            return True
        applied = False  # of some: which, is seen one by one
        for plan in right:
            alone = self._with([plan])
            if (error := self._error(alone)) <= self.tolerance:
                self.wide, applied = alone, True
                self._note(kind, plan)
            else:
                self._undo(kind, plan, f"would change the output by {error:.1e}")
        return applied

    def _with(self, plans: list[Plan]) -> nn.Module:
        # parameters are large, and stay what they are: see Plan.apply
        shared = {id(each): each for each in self.wide.parameters()}
        changed = copy.deepcopy(self.wide, shared)
        for plan in plans:
            plan.apply(changed, in_place=False)
        return changed

    def _error(self, model: nn.Module) -> float:
        if self.proof is not None:
            return self.proof.error(model)
        try:
            outputs(model, *self.given)
        except Exception:
            return torch.inf
        return 0.0

    def _undo(self, kind: str, plan: Plan, why: str) -> None:
        self.failed.add((plan.path, kind))
        how = f"folded {plan.what}" if plan.outcome == "folded" else "as a factor and a term"
        self._leave(kind, plan.path, f"{how} it {why}")

    def _note(self, kind: str, plan: Plan) -> None:
        self.applied.append(replace(plan, checks=[], added={}))
        self.folded_into |= set(plan.into)
        if kind != "joined":
            why = "" if plan.outcome == "folded" else self._reason(plan.path)
            self.goes_to[plan.path] = plan.into
            self.done[plan.path] = LayerReport(plan.path, plan.outcome, plan.what, why)
            return
        for path, goes_to in self.goes_to.items():  # what was folded into this convolution goes on with it
            if plan.path in goes_to:
                others = [each for each in goes_to if each != plan.path]
                self.goes_to[path] = tuple(dict.fromkeys([*others, *plan.into]))
                what = "into " + ", ".join(self.goes_to[path])
                self.done[path] = replace(self.done[path], what=what)

    def _reason(self, path: str) -> str:
        found = self.why.get(path, {})
        return "; ".join(dict.fromkeys(found[kind] for kind in ("", "before", "behind") if kind in found))

    def _report(self, path: str) -> LayerReport:
        if path in self.done:
            return self.done[path]
        if path not in self.why:
            return LayerReport(path, "left alone", why="was not called with these inputs")
        why = self.why[path]
        return LayerReport(path, "left alone", why=why.get("") or why.get("affine") or self._reason(path))


def _apart(plans: Iterable[Plan]) -> list[Plan]:
    """Those of the plans that touch nothing that one before touches: the others' turn is in the next round."""
    taken: set[str] = set()
    found = []
    for plan in plans:
        if not taken & plan.touched:
            taken |= plan.touched
            found.append(plan)
    return found


def _make_plain(module: Any) -> None:
    """Make what its parametrizations compute parameters of `module`.

    Not by torch's function: that changes the class, which a copy of a module has in common with the module.
    """
    values = {
        name: (getattr(module, name).detach().clone(), any(True for _ in each.parameters()))
        for name, each in module.parametrizations.items()
    }
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, (tensor, is_parameter) in values.items():
        if is_parameter:
            module.register_parameter(name, nn.Parameter(tensor))
        else:
            module.register_buffer(name, tensor)


def _observed(model: nn.Module, given: tuple[Any, Any]) -> Observation:
    inputs, keywords = copy.deepcopy(given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return observe(model, *inputs, **keywords)


def _double(model: nn.Module) -> nn.Module:
    """The model in float64, with what its forward has kept in attributes."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules") or not isinstance(value, Tensor | dict | list):
                continue
            if any(isinstance(each, Tensor) for each in tree_leaves(value)):
                vars(module)[name] = as_dtype(value, torch.float64)
    return model.double()


def _dtype_at(original: nn.Module, path: str) -> torch.dtype:
    """The dtype of the layer, or other module, at `path`."""
    layer = original.get_submodule(path)
    found = [each.dtype for each in [*layer.parameters(), *layer.buffers()] if each.is_floating_point()]
    return found[0] if found else torch.get_default_dtype()


def _operations(model: nn.Module, given: Any) -> int:
    """How many operations a run has, layout changes left out."""
    seen = _observed(model, given)
    number = sum(each.name not in (*LAYOUT, REREAD) for each in seen.operations)
    seen.forget()
    return number


def _size(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def _is_traceable(model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Whether what the model calls depends on nothing but the types of its inputs."""
    if not all(isinstance(each, Tensor) for each in [*inputs, *keywords.values()]):
        return False
    names = list(parameters(model) or {})[: len(inputs)]
    try:
        whole_trace(model, False, [*names, *keywords])
    except Untraceable:
        return False
    return True
