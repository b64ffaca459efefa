"""What a model computes, seen in one run: which operation, in which module's call, made which tensor from which.

    seen = observe(model, images)
    for call in seen.calls_of(model.layer1[0].bn1):
        (made,) = call.reads                       # the value that it normalises
        made.producer.name, made.users             # "aten.convolution", by whom else it is read

Nothing is traced, so that control flow, einops, custom autograd functions and every model that runs can be observed; in
return only what happened for these inputs is known. Operations are those that torch's dispatcher sees, below
autograd: what a composite one such as `linear` consists of.

A tensor that is changed in place, itself or through a view, is a new value from then on, made by what changed it; one
that shares its memory is, when it is next read, made by an operation `REREAD` of its old value and of the change.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.graph.modules import is_compiled

Kind = Literal["input", "parameter", "buffer", "constant", "result"]
REREAD = "observation.reread"


@dataclass(eq=False)
class Value:
    """A tensor at some time: what an operation made, or what was there before.

    kind: "result" of an operation; "input" of the model; "parameter" or "buffer"; "constant" for any other tensor.
    name: of a parameter or buffer its path in the model, else empty.
    producer: the operation that made it, None unless it is a result.
    users: the operations that read it, in order, each once.
    is_output: whether the model returns it, or it is still there after the run: in an attribute, say.
    """

    kind: Kind
    name: str
    shape: torch.Size
    dtype: torch.dtype
    producer: Operation | None = None
    users: list[Operation] = field(default_factory=list)
    is_output: bool = False

    @property
    def only_user(self) -> Operation | None:
        """The operation that reads it, if there is one only and the model does not return it."""
        return self.users[0] if len(self.users) == 1 and not self.is_output else None


@dataclass(eq=False)
class Operation:
    """A call of an operator.

    operator: itself, to be called again.
    name: of the operator, "aten.convolution".
    call: the innermost call of a module in which it happened; None outside of any.
    arguments, keywords: as they were given, with a `Value` for each tensor.
    results: the values that it made, also those that it has changed in place.
    """

    operator: Any
    name: str
    call: ModuleCall | None
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    results: list[Value] = field(default_factory=list)

    def argument(self, name: str) -> Any:
        """The argument of that name in the operator's schema, its default where it was not given."""
        for place, argument in enumerate(self.operator._schema.arguments):
            if argument.name == name:
                given = self.arguments[place : place + 1]
                return given[0] if given else self.keywords.get(name, argument.default_value)
        raise KeyError(f"{self.name} has no argument {name}")

    @property
    def reads(self) -> list[Value]:
        """The values that it reads, each once, in the order of its arguments."""
        found = tree_leaves((self.arguments, self.keywords))
        return list(dict.fromkeys(each for each in found if isinstance(each, Value)))


@dataclass(eq=False)
class ModuleCall:
    """A call of a module.

    path: of the module in the model, the first one if it has several; "" for the model itself.
    number: how many calls of the module came before.
    caller: the call in which this one happened.
    given: the values among its positional arguments.
    operations: those within it, also within the calls of its children.
    returns: the values that it returned.
    takes_tensor: whether its first positional argument is a tensor.
    returns_tensor: whether what it returned is a tensor, and not something with tensors in it.
    """

    module: nn.Module
    path: str
    number: int
    caller: ModuleCall | None
    given: list[Value]
    operations: list[Operation] = field(default_factory=list)
    returns: list[Value] = field(default_factory=list)
    takes_tensor: bool = False
    returns_tensor: bool = False

    @property
    def reads(self) -> list[Value]:
        """The values that come from outside: made by no operation of the call, and no parameter or buffer."""
        own = set(map(id, self.operations))
        found = [value for operation in self.operations for value in operation.reads]
        outside = [
            value
            for value in found
            if value.kind in ("input", "constant")
            or (value.kind == "result" and id(value.producer) not in own)
        ]
        return list(dict.fromkeys(outside))


@dataclass(eq=False)
class Observation:
    """All that was seen of a model, in order.

    inputs, outputs: the tensors that it was given and that it returned.
    """

    model: nn.Module
    operations: list[Operation] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)

    def forget(self) -> None:
        """Let go of the modules, whose weights else stay in memory until Python looks for cycles."""
        for operation in self.operations:
            operation.call = None
            operation.results.clear()

    def calls_of(self, module: nn.Module) -> list[ModuleCall]:
        """The calls of a module, in order."""
        return [call for call in self.calls if call.module is module]


def observe(model: nn.Module, *inputs: Any, **keywords: Any) -> Observation:
    """Run the model once, in the mode in which it is, without gradients, and return what was seen.

    Args:
        model: any module; a compiled one is refused, as its operations are not those of its modules.
        inputs: of its forward.
        keywords: of its forward.

    Returns:
        The operations, the calls of modules, and the values between them; no tensor is kept.

    Raises:
        ValueError: the model is compiled. What its forward raises is passed on. In each case the model, its buffers and
            the generators of random numbers are as they were.
    """
    return observe_run(model, lambda: model(*inputs, **keywords), (inputs, keywords))


def observe_run(model: nn.Module, run: Callable[[], Any], given: Any) -> Observation:
    """The same of `run()`, which calls the model somehow, with the tensors in `given`."""
    for path, module in model.named_modules():
        if is_compiled(module):
            raise ValueError(f"{path or 'the model'} is compiled: observe the module itself, its _orig_mod")
    with torch.inference_mode(False), as_it_was(model), torch.no_grad():
        observer = _Observer(model, given)
        with observer.watching_modules(), observer:
            returned = run()
        return observer.finish(returned)


class _Observer(TorchDispatchMode):
    """Keeps every tensor that it sees until the end, so that no two have one identity."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Observation(model)
        self._paths = {module: path for path, module in reversed(list(model.named_modules()))}
        self._stack: list[ModuleCall] = []
        self._numbers: defaultdict[nn.Module, int] = defaultdict(int)
        self._kept: dict[int, Tensor] = {}
        self._values: dict[
            int, tuple[Value, int]
        ] = {}  # by tensor; with the changes of its memory that it has in it
        self._changes: defaultdict[int, list[Value]] = defaultdict(list)  # by memory
        for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, tensor in named:
                self._add(tensor, Value(kind, name, tensor.shape, tensor.dtype))  # type: ignore[arg-type]
        for tensor in tensors_of(inputs):
            if id(tensor) not in self._values:
                value = self._add(tensor, Value("input", "", tensor.shape, tensor.dtype))
                self.seen.inputs.append(value)

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        read = tree_map(self._read, (arguments, keywords))
        returned = operator(*arguments, **keywords)
        operation = self._record(operator, str(operator).rpartition(".")[0], *read)
        changed = _changed(operator, arguments, keywords)
        for tensor in [*changed, *_tensors(returned)]:
            if any(tensor is each for each in changed) and self._is_result_of(tensor, operation):
                continue  # returned as well
            value = Value("result", "", tensor.shape, tensor.dtype, operation)
            operation.results.append(value)
            if any(tensor is each for each in changed):
                self._changes[_memory(tensor)].append(value)
            self._add(tensor, value)
        return returned

    @contextmanager
    def watching_modules(self) -> Iterator[None]:
        """Know in which module's call an operation happens, by hooks that no module has of its own."""

        def enter(module: nn.Module, arguments: Any) -> None:
            caller = self._stack[-1] if self._stack else None
            path = self._paths.get(module)
            if path is None:  # made within a forward
                path = f"{caller.path if caller else ''}.<{type(module).__name__}>"
            given = [self._read(tensor) for tensor in _tensors(arguments)]
            call = ModuleCall(module, path, self._numbers[module], caller, given)
            call.takes_tensor = bool(arguments) and isinstance(arguments[0], Tensor)
            self._numbers[module] += 1
            self._stack.append(call)
            self.seen.calls.append(call)

        def leave(module: nn.Module, _: Any, returned: Any) -> None:
            call = self._stack.pop()
            assert call.module is module
            call.returns = [self._read(tensor) for tensor in _tensors(returned)]
            call.returns_tensor = isinstance(returned, Tensor)

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, returned: Any) -> Observation:
        self.seen.outputs = [self._read(tensor) for tensor in tensors_of(returned)]
        for value in self.seen.outputs:
            value.is_output = True
        self._let_go()
        return self.seen

    def _let_go(self) -> None:
        """Keep no tensor; what somebody else still has, in an attribute or in what was given, is an output too."""
        watched = {key: weakref.ref(tensor) for key, tensor in self._kept.items()}
        self._kept.clear()
        for key, tensor in watched.items():
            value = self._values[key][0]
            if tensor() is not None and value.kind == "result":
                value.is_output = True

    def _record(
        self, operator: Any, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Operation:
        call = self._stack[-1] if self._stack else None
        operation = Operation(operator, name, call, arguments, keywords)
        self.seen.operations.append(operation)
        for value in operation.reads:
            value.users.append(operation)
        while call is not None:
            call.operations.append(operation)
            call = call.caller
        return operation

    def _read(self, tensor: Any) -> Any:
        """The value that a tensor is now; what is no tensor as it is."""
        if not isinstance(tensor, Tensor):
            return tensor
        known = self._values.get(id(tensor))
        if known is None:
            return self._add(tensor, Value("constant", "", tensor.shape, tensor.dtype))
        value, included = known
        changes = self._changes[_memory(tensor)]
        if len(changes) == included:
            return value
        operation = self._record(None, REREAD, (value, *changes[included:]), {})
        value = Value("result", "", tensor.shape, tensor.dtype, operation)
        operation.results.append(value)
        return self._add(tensor, value)

    def _add(self, tensor: Tensor, value: Value) -> Value:
        self._kept[id(tensor)] = tensor
        self._values[id(tensor)] = value, len(self._changes[_memory(tensor)])
        return value

    def _is_result_of(self, tensor: Tensor, operation: Operation) -> bool:
        known = self._values.get(id(tensor))
        return known is not None and known[0].producer is operation


def _tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors in what a model is given or returns: in containers, and in the attributes of objects."""
    found, seen = [], set()
    waiting = [values]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Tensor):
            found.append(each)
        elif id(each) not in seen:
            seen.add(id(each))
            leaves = tree_leaves(each)
            if leaves != [each]:
                waiting += reversed(leaves)
            elif isinstance(each, Mapping):
                waiting += reversed(list(each.values()))
            elif hasattr(each, "__dict__") and not isinstance(each, type | nn.Module | FunctionType):
                waiting += reversed(list(vars(each).values()))
    return found


def _memory(tensor: Tensor) -> int:
    """What all tensors that share memory have in common."""
    try:
        return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
    except NotImplementedError:  # of torch.func's transforms
        return id(tensor)


def _changed(operator: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call of the operator changes in place."""
    found: list[Tensor] = []
    for place, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = arguments[place] if place < len(arguments) else keywords.get(argument.name)
            found += _tensors(given)
    return found


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore the buffers and the generators of random numbers at the end."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {each.device for each in [*model.parameters(), *model.buffers()] if each.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, values in before:
                    if not torch.equal(buffer, values):
                        buffer.copy_(values)


# What only arranges values, so that a factor or a term of a channel stays one.
LAYOUT = frozenset(
    f"aten.{name}"
    for name in (
        "alias",
        "clone",
        "contiguous",
        "detach",
        "expand",
        "permute",
        "reshape",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
        "_reshape_alias",
        "_unsafe_view",
    )
)

# The operators that normalise by given or by a batch's moments.
BATCH_NORM = frozenset(
    {
        "aten.native_batch_norm",
        "aten.cudnn_batch_norm",
        "aten.miopen_batch_norm",
        "aten._native_batch_norm_legit",
        "aten._native_batch_norm_legit_no_training",
        "aten._batch_norm_no_update",
        "aten._batch_norm_with_update",
        "batchnorm.forward",
        "batchnorm.stepwise",
    }
)


def behind_layout(value: Value, through: Callable[[Operation], bool] | None = None) -> Value:
    """The value that `value` is an arrangement of: followed back as long as only it is read.

    through: which further operations are passed.
    """
    while (made := value.producer) is not None and len(made.reads) == 1:
        if made.name not in LAYOUT and not (through is not None and through(made)):
            break
        value = made.reads[0]
    return value
