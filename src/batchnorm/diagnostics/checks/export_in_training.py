"""BN601: a graph for deployment with layers in training mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from batchnorm.diagnostics.check import Case, Check
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.subject import Subject

_CALLS = ("batch_norm", "_native_batch_norm_legit", "native_batch_norm", "_batch_norm_with_update")


class ExportInTraining(Check):
    code = "BN601"
    name = "export-in-training"
    severity = "error"
    symptom = "The exported model's outputs depend on the batch and differ from the model's."
    why = (
        "A graph keeps the mode in which it was made: batch normalization by the batch's statistics is then part of "
        "it, whatever .eval() says later."
    )
    source = "pytorch #75252, #49229, #41231; onnx #5590; onnxruntime #3873; Lightning #11076"

    def find(self, subject: Subject) -> Iterator[Finding]:
        if subject.use in ("export", "inference"):
            for path, layer in subject.learning.items():
                if layer.training:
                    yield self.finding(
                        path,
                        f"is in training mode, and the model is for {subject.use}",
                        "model.eval() first; bn.export does",
                    )
        for path, module in subject.model.named_modules():
            if isinstance(module, fx.GraphModule):
                for node in module.graph.nodes:
                    if _trains(node):
                        where = _origin(node) or node.name
                        yield self.finding(
                            where,
                            f"its graph calls {_name(node)} in training mode"
                            + (f" (in {path})" if path else ""),
                            "model.eval() before torch.export or torch.jit.trace, or bn.export(model, path, images)",
                            node=node.name,
                        )
            elif isinstance(module, torch.jit.ScriptModule) and not path:
                yield from self._traced(module)

    def _traced(self, module: Any) -> Iterator[Finding]:
        if type(module).__name__ != "TopLevelTracedModule":
            return  # a scripted one has modes
        graph: Any = module.inlined_graph
        for node in graph.findAllNodes("aten::batch_norm"):
            mode = list(node.inputs())[5]
            if mode.node().kind() == "prim::Constant" and mode.toIValue():
                scope = node.scopeName().rpartition("/")[2]
                path = scope.rpartition("::")[2].removeprefix("__module.")
                yield self.finding(
                    path,
                    "was traced in training mode",
                    "model.eval() before torch.jit.trace, or bn.export(model, path, images)",
                )

    def plant(self, case: Case) -> None:
        case.options["use"] = "inference"
        case.model.eval()
        case.layer.train()


def _trains(node: fx.Node) -> bool:
    if node.op != "call_function" or _name(node) not in _CALLS:
        return False
    if _name(node) == "batch_norm":  # torch's operator, F.batch_norm or ours
        return bool(node.kwargs.get("training", node.args[5] if len(node.args) > 5 else False))
    return (
        True
        if _name(node) == "_batch_norm_with_update"
        else bool(next((a for a in node.args[3:] if isinstance(a, bool)), False))
    )


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def _origin(node: fx.Node) -> str:
    """The path of the module that the node was made in, as torch.export writes it down."""
    stack = node.meta.get("nn_module_stack") or {}
    last = list(stack.values())[-1][0] if stack else ""
    return str(last).removeprefix("L['self'].").replace("._modules['", ".").replace("']", "").strip(".")
