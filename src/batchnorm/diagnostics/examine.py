"""`examine(model)`: what the checks find."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from batchnorm.diagnostics.check import checks
from batchnorm.diagnostics.finding import Findings
from batchnorm.diagnostics.subject import Subject


def examine(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Findings:
    """Look for bugs that no error shows; nothing is changed.

    model: anybody's, with layers of torch's or ours.
    optimizer: that trains it; without it, what concerns one is not looked for.
    select: codes, or beginnings of codes ("BN2"); none: all.
    ignore: likewise, of those that are left out.

    Raises: ValueError for a code of no check.
    """
    known = [check.code for check in checks()]
    for code in (*select, *ignore):
        if not any(each.startswith(code) for each in known):
            raise ValueError(f"there is no check {code!r}: {', '.join(known)}")
    subject = Subject(model, optimizer)
    order = {path: number for number, (path, _) in enumerate(model.named_modules())}
    found = [
        finding
        for check in checks()
        if (not select or check.code.startswith(tuple(select)))
        and not check.code.startswith(tuple(ignore) or "-")
        for finding in check.find(subject)
    ]
    return Findings(sorted(found, key=lambda each: order.get(each.layer, 0)))
