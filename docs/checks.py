"""Writes docs/checks.md from the checks themselves: `python docs/checks.py > docs/checks.md`."""

from batchnorm.diagnostics.check import Check, checks

GROUPS = {
    "BN1": "What is before a layer",
    "BN2": "A layer and its statistics",
    "BN3": "The training",
    "BN4": "What comes to a layer in batches",
    "BN5": "Several processes",
    "BN6": "Where the model goes",
    "BN7": "What it costs",
}
NEEDS = {
    "structure": "a run on a batch, or on a made-up input",
    "measured": "batches",
    "leaks": "batches",
    "updates": "batches",
    "optimizer": "`optimizer=`",
    "state": "`state=`",
    "reference": "`reference=`",
    "ranks": "several processes",
    "steps": "`bn.watch`",
}


def page() -> str:
    """All of it, as Markdown."""
    lines = [
        "# Checks of `bn.examine` and `bn.watch`",
        "",
        "Written by `python docs/checks.py` from the checks themselves; [doctor.md](doctor.md) says how they are used.",
        "A code never changes its meaning. Sources like `pytorch #N` are issues on GitHub, of pytorch/pytorch here.",
    ]
    for prefix, title in GROUPS.items():
        group = [check for check in checks() if check.code.startswith(prefix)]
        if not group:
            continue
        lines += [
            "",
            f"## {title}",
            "",
            "| code | name | severity | needs | `fix=True` |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| [{each.code}](#{_anchor(each)}) | {each.name} | {each.severity} | {_needs(each)} | "
            f"{'yes' if each.fixes else ''} |"
            for each in group
        ]
        for each in group:
            lines += [
                "",
                f"### {each.code} {each.name}",
                "",
                each.symptom,
                "",
                f"Why: {each.why}",
                "",
                f"Source: {each.source}",
            ]
    return "\n".join(lines) + "\n"


def _needs(check: Check) -> str:
    return ", ".join(dict.fromkeys(NEEDS[each] for each in check.needs)) or "the model"


def _anchor(check: Check) -> str:
    return f"{check.code} {check.name}".lower().replace(" ", "-")


if __name__ == "__main__":
    print(page(), end="")
