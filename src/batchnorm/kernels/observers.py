"""Who watches a call beside autograd: a compiler, an exporter, torch.func's transforms, a recomputation.

What they may not see, or must, decides which kernels compute and whether running statistics move.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PLAIN = frozenset((Tensor, nn.Parameter, type(None)))


def transformed() -> bool:
    """Whether torch.func's transforms or forward-mode gradients are active: then numbers cannot be asked for."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active or torch.autograd.forward_ad._current_level >= 0


def needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether a call must go through torch's dispatcher: for a compiler, a dispatch mode or a tensor subclass."""
    return (
        torch.compiler.is_dynamo_compiling()  # an exporter without dynamo has a dispatch mode
        or torch._C._len_torch_dispatch_stack() > 0
        or not _PLAIN.issuperset(map(type, tensors))
    )


def captured() -> bool:
    """Whether a graph is being captured that must run where this library is not: torch.export's, torch.jit.trace's.

    torch.onnx, AOTInductor and ExecuTorch begin with one of these. torch.compile runs here, where our operators are.
    """
    return torch.compiler.is_exporting() or (
        not torch.compiler.is_dynamo_compiling() and torch._C._is_tracing()
    )


def recomputing() -> bool:
    """Whether this forward pass runs inside a backward pass, as activation checkpointing does it.

    Then its batch has been seen already. Both modes of torch.utils.checkpoint recompute from within the autograd
    engine, where a graph task is current. A compiled model recomputes below the level of modules; only an eager
    checkpoint around a compiled layer is not noticed, since compiled code cannot ask.
    """
    return not torch.compiler.is_dynamo_compiling() and torch._C._current_graph_task_id() != -1
