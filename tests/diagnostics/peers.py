"""The planted bugs given to torch-audit and torchtest2: `python -m tests.diagnostics.peers` prints who finds what.

Each is run as its README says, on the networks of the tests in training mode with a batch, an optimizer and a loss.
A bug counts as found where a tool says something that it does not say of the healthy network, anywhere.
"""

import copy
import logging
import sys
import warnings
from collections import Counter

import torch

from batchnorm.diagnostics.check import checks
from tests.diagnostics.networks import NETWORKS, case

UNRELATED = {"TA200"}  # widths that tensor cores like, of layers that were put in
SEVERAL_PROCESSES = {"BN501", "BN502"}


_WRONG = ("FAIL", "FAILED", "WARN", "WARNING", "ERROR")


def loss_of(made):
    return made.square().mean()


def torch_audit(planted):
    """Rule and module of each finding, of a static audit and of two audited steps."""
    from torch_audit import Auditor, audit

    model, batches, optimizer = planted.model, planted.batches, planted.optimizer
    found = {
        (each.rule_id, each.module_path or "")
        for phase in ("static", "init")
        for each in audit(model, phase=phase, batch=batches[0], optimizer=optimizer).findings
    }
    auditor = Auditor(model, optimizer=optimizer, every_n_steps=1)
    with auditor:
        auditor.audit_static()
        auditor.audit_init()
        for batch in (batches[0], batches[-1]):
            for part in batch.chunk(planted.options.get("passes", 1)):
                auditor.backward(loss_of(auditor.forward(part)))
            auditor.optimizer_step() if optimizer is not None else None
            if "between" in planted.options:
                planted.options["between"](model, batch)
    return found | {(each.rule_id, each.module_path or "") for each in auditor.finish().findings}


def torchtest2(planted):
    """The checks that fail or warn."""
    import torchtest2 as tool

    report = tool.check_model(
        planted.model,
        planted.batches[-1],
        loss_fn=loss_of,
        optimizer=planted.optimizer,
        overfit_steps=10,
    )
    return {(each.name, "") for each in report.results if each.status.name in _WRONG}


def said(tool, planted):
    """What a tool says; the error that it ends with, if it does."""
    torch.manual_seed(0)
    trial = copy.copy(planted)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tool(trial)
    except Exception as error:
        return {(type(error).__name__, "")}


def rows(networks):
    """Code and name of each check, and what each tool says of the bug, with the number of networks in which it does."""
    tools = (torch_audit, torchtest2)
    usual = {name: [said(tool, case(name)) for tool in tools] for name in networks}
    for check in checks():
        if check.code in SEVERAL_PROCESSES or check.on_request:
            continue
        cells = []
        for number, tool in enumerate(tools):
            found: Counter[str] = Counter()
            for name in networks:
                planted = case(name)
                check.plant(planted)
                new = said(tool, planted) - usual[name][number]
                found.update({rule for rule, _ in new} - UNRELATED)
            cells.append(", ".join(f"{rule} ({times})" for rule, times in sorted(found.items())) or "—")
        yield f"| {check.code} {check.name} | {cells[0]} | {cells[1]} |"


if __name__ == "__main__":
    logging.disable()
    print("| planted | torch-audit 0.3.0 | torchtest2 0.1.0 |\n|---|---|---|")
    for row in rows(sys.argv[1:] or NETWORKS):
        print(row)
        sys.stdout.flush()
