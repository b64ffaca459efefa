"""Dropout and local response normalization, which batch normalization takes the place of (section 4.2.1)."""

from __future__ import annotations

from torch import nn

from batchnorm.graph.nonlinearity import DROPOUT, RECURRENT, RESPONSE, is_named_attention
from batchnorm.passes.report import LayerReport


def regularization(model: nn.Module, dropout: str | float, keeps: bool) -> dict[str, LayerReport]:
    """Remove or weaken dropout, and remove local response normalization, but for what attention and recurrence have.

    keeps: whether the model must compute what it did, so that what is no identity in evaluation stays.
    """
    rows: dict[str, LayerReport] = {}
    apart = [path for path, module in model.named_modules() if path and _keeps_its_own(module)]
    gone: set[nn.Module] = set()
    for path, module in model.named_modules():
        kind = type(module).__name__
        within = next((each for each in apart if path.startswith(f"{each}.")), None)
        if within is not None:
            if isinstance(module, DROPOUT) and module.p and dropout != "keep":
                rows[path] = LayerReport(path, "left alone", why=f"is part of {within}")
            continue
        if isinstance(module, DROPOUT) and module.p and dropout != "keep":
            if not type(module).__module__.startswith("torch.nn."):
                rows[path] = LayerReport(path, "left alone", why=f"{kind} has a forward of its own")
            elif dropout == "drop":
                rows[path] = LayerReport(path, "removed", kind)
                gone.add(module)
            elif module.p > float(dropout):
                rows[path] = LayerReport(path, "weakened", kind, f"{module.p:g} to {float(dropout):g}")
                module.p = float(dropout)
        elif isinstance(module, RESPONSE) and keeps:
            why = f"{kind} stays: identity= keeps what the model computes"
            rows[path] = LayerReport(path, "left alone", why=why)
        elif isinstance(module, RESPONSE):
            rows[path] = LayerReport(path, "removed", kind)
            gone.add(module)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in gone:
                identity = nn.Identity().train(child.training)
                if isinstance(child, DROPOUT):
                    identity.p = 0.0  # type: ignore[assignment]  # which a forward may read
                parent._modules[name] = identity
    return rows


def _keeps_its_own(module: nn.Module) -> bool:
    """Whether it is recurrent, attention by its name, or a layer of torch's transformer, whose fast path knows both."""
    if isinstance(module, (*RECURRENT, nn.TransformerEncoderLayer)):
        return True
    return is_named_attention(module) and not any(isinstance(each, nn.Conv2d) for each in module.modules())
