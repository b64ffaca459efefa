"""Graphs that torch.export captures: what they call, and how they compare with the module they are of."""

import copy
from collections import Counter

import torch
from torch.export import Dim, ExportedProgram, export
from torch.testing import assert_close


def exported(module, *inputs, strict=False, dynamic=True) -> ExportedProgram:
    """The program of a copy of `module`, for any number of samples if `dynamic`: export moves the statistics."""
    shapes = None
    if dynamic:
        sample = {0: Dim("samples", min=2)}
        shapes = tuple(None if each is None else sample for each in inputs)
    return export(copy.deepcopy(module), inputs, strict=strict, dynamic_shapes=shapes)


def operators(program) -> Counter[str]:
    """How often each operator is called; arithmetic with sizes, which are no tensors, aside."""
    return Counter(
        str(node.target)
        for node in program.graph.nodes
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor | tuple | list)
    )


def foreign(program) -> list[str]:
    """The operators that are not torch's own."""
    return [name for name in operators(program) if not name.startswith("aten.")]


def same_as(graph, module, *inputs, tolerance=1e-5):
    """Run both on `inputs`: the same output, and the same running statistics afterwards."""
    expected = module(*inputs)
    assert_close(graph(*inputs), expected, rtol=tolerance, atol=tolerance)
    state = dict(graph.state_dict())
    for name, value in module.state_dict().items():
        if name in state:  # what an evaluating graph has no use for, it has not
            assert_close(state[name], value, rtol=tolerance, atol=tolerance)
