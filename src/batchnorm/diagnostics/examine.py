"""`examine(model, batches)`: what the checks find."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from batchnorm.calibrate.batches import Forward
from batchnorm.diagnostics.check import Check, checks
from batchnorm.diagnostics.finding import Examined, Finding, Findings, Fixed
from batchnorm.diagnostics.measured import Measured
from batchnorm.diagnostics.runs import Runs
from batchnorm.diagnostics.subject import USES, Missing, Subject, Use
from batchnorm.graph.modules import refuse_lazy

Ignored = Sequence[str] | Mapping[str, Sequence[str]]


def examine(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    forward: Forward | None = None,
    limit: int = 8,
    select: Sequence[str] = (),
    ignore: Ignored = (),
    fix: bool = False,
    state: Mapping[str, Any] | None = None,
    reference: nn.Module | None = None,
    use: Use | None = None,
) -> Findings:
    """Look for bugs with batch normalization that no error shows, as a linter does in a text.

    Each check has a code and a page of its own (docs/checks.md). Many need the model alone: without batches what is
    before each layer is seen in a run on a made-up input, where the model takes one. Those of data need batches of the
    training. Model, optimizer, modes, hooks, gradients and generators of random numbers are afterwards as they were,
    also after an error; with `fix` but for what is listed as fixed.

    Args:
        model: anybody's, with layers of torch's, timm's, detectron2's or ours; in DDP, compiled or scripted too.
        batches: of its training: tensors, tuples whose first is the input, or mappings of arguments. They are moved to
            the device of the model.
        optimizer: that trains it.
        forward: called with model and batch, where that is not how the model is called.
        limit: how many of the batches are used, at most; of a list the last one too.
        select: codes, or beginnings of codes ("BN2"), or names ("momentum"); none: all.
        ignore: likewise, what is left out; or a mapping of patterns of paths, {"backbone.*": ["BN205"]}.
        fix: mend what can be mended without a decision, and list it in `fixed`.
        state: a state_dict that is to be loaded into the model.
        reference: the model as it was trained, with which this one is compared.
        use: what the model is for now: "training", "inference", "export", "private" (differential privacy) or
            "federated".

    Returns: Findings, the worst first; why checks were not made is in `skipped`.

    Raises:
        ValueError: a code of no check; an unknown use; a lazy layer that has no size yet; a model on the meta device.
        TypeError: `batches` is one tensor or mapping.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8, momentum=0.99))
        >>> findings = bn.examine(model, torch.randn(64, 4).split(16), select=["BN2"])
        >>> [(each.code, each.severity, each.layer) for each in findings]
        [('BN201', 'warning', '1')]
        >>> bn.examine(model, select=["BN201"], fix=True).fixed[0].change
        'momentum 0.99 → 0.01'
    """
    if use is not None and use not in USES:
        raise ValueError(f"use must be one of {', '.join(USES)}, got {use!r}")
    chosen, patterns = selected(select, ignore)
    refuse_lazy(model)
    if any(each.is_meta for each in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "the model is on the meta device, without values: model.to_empty and load its weights first"
        )

    runs = Runs(model, batches, forward, limit)

    def look() -> Subject:
        return Subject(model, runs, optimizer, state, reference, use, loader=batches)

    subject = look()
    found = found_by(chosen, subject, patterns)
    if not fix:
        return found
    by_code = {check.code: check for check in checks()}
    fixed = []
    for finding in found:
        change = by_code[finding.code].fix(subject, finding) if finding.severity != "info" else ""
        if change:
            fixed.append(Fixed(finding, change))
    if not fixed:
        return found
    again = found_by(chosen, look(), patterns)
    return Findings(list(again), again.skipped, fixed, again.layers)


def selected(select: Sequence[str], ignore: Ignored) -> tuple[list[Check], dict[str, list[Check]]]:
    """The checks that are chosen, and those that are left out for patterns of paths. Raises: ValueError."""
    if isinstance(select, str) or isinstance(ignore, str):
        raise ValueError("select and ignore are lists of codes")
    by_pattern = (
        {pattern: _named(codes) for pattern, codes in ignore.items()} if isinstance(ignore, Mapping) else {}
    )
    left_out = [] if isinstance(ignore, Mapping) else _named(ignore)
    chosen = _named(select) if select else [check for check in checks() if not check.on_request]
    return [check for check in chosen if check not in left_out], by_pattern


def _named(codes: Sequence[str]) -> list[Check]:
    known = checks()
    found = []
    for code in codes:
        matching = [each for each in known if each.code.startswith(code) or each.name == code]
        if not matching or not code:
            raise ValueError(
                f"there is no check {code!r}: {', '.join(f'{each.code} {each.name}' for each in known)}"
            )
        found += matching
    return list(dict.fromkeys(found))


def found_by(chosen: Sequence[Check], subject: Subject, ignored: Mapping[str, Sequence[Check]]) -> Findings:
    """What these checks find, without what others explain."""
    order = {path: number for number, (path, _) in enumerate(subject.model.named_modules())}
    found: list[Finding] = []
    skipped: dict[str, str] = {}
    for check in chosen:
        try:
            subject.require(check.needs)
            found += check.find(subject)
        except Missing as why:
            skipped[check.code] = str(why)
    by_code = {check.code: check for check in checks()}
    serious = [each for each in found if each.severity != "info"]

    def is_explained(finding: Finding) -> bool:
        check, place = by_code[finding.code], order.get(finding.layer, 0)
        return any(
            (each.layer == finding.layer and each.code in check.yields_to)
            or ((order.get(each.layer, 0) <= place or not finding.layer) and each.code in check.follows)
            for each in serious
        )

    kept = [
        each
        for each in found
        if not is_explained(each)
        and not any(
            fnmatchcase(each.layer, pattern) and by_code[each.code] in codes
            for pattern, codes in ignored.items()
        )
    ]
    found = sorted(kept, key=lambda each: order.get(each.layer, 0))
    return Findings(found, skipped, layers=[_examined(path, subject) for path in subject.layers])


def _examined(path: str, subject: Subject) -> Examined:
    layer = subject.layers[path]
    kind = f"{type(layer).__name__}({getattr(layer, 'num_features', '')})"
    measured: Measured | None = vars(subject).get("measured")  # if a check has asked for it
    found = measured.layers.get(path) if measured is not None else None
    if measured is None or found is None:
        return Examined(path, kind)
    gap, by_chance = (None, None) if measured.live else found.distance(layer)
    return Examined(path, kind, gap, by_chance, found.count, found.noise)
