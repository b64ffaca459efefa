"""Write docs/experiments.md from what was measured, so that no number in it is typed by hand.

python docs/experiments.py RUN     take the verdicts and pictures of a run, then write the page
python docs/experiments.py         write the page again from docs/measured.jsonl
"""

import re
import shutil
import sys
from pathlib import Path

from batchnorm.records import Run, Table, Verdict, read

DOCS = Path(__file__).parent
MEASURED = DOCS / "measured.jsonl"

INTRODUCTION = """# Experiments

What the paper claims, what was expected, and what was measured here on the 10,000 real digits that come with the
package (8,000 to train on, 2,000 to test). A verdict may be "not seen here". This page is written by
`docs/experiments.py` from the records of one run, `docs/measured.jsonl`:

```bash
{command}
```

{machine}; {versions}. On the same machine the same command gives the same numbers.
"""


def take(run: Path) -> None:
    """Copy the run's head, its last verdict of every claim and the pictures of the documentation."""
    records = list(read(run / "records.jsonl"))
    verdicts = {record.claim: record for record in records if isinstance(record, Verdict)}
    (head,) = (record for record in records if isinstance(record, Run))
    # where it was written to is nobody's business
    command = re.sub(r" --out(?:=| )(?:'[^']*'|\S+)", "", head.command)
    head = head.model_copy(update={"command": command})
    kept = [head, *verdicts.values()]
    MEASURED.write_text("".join(record.model_dump_json() + "\n" for record in kept))
    for picture in (
        "figure-1a.png",
        "figure-1bc.png",
        "higher-rates.png",
        "initial-weights.png",
        "saturation.png",
    ):
        shutil.copy(run / "figures" / picture, DOCS / "images" / picture)


def page() -> str:
    """The page, from docs/measured.jsonl."""
    head, *verdicts = read(MEASURED)
    assert isinstance(head, Run)
    versions = ", ".join(f"{name} {version}" for name, version in head.versions.items())
    parts = [INTRODUCTION.format(command=head.command, machine=head.machine, versions=versions)]
    order = sorted(
        (v for v in verdicts if isinstance(v, Verdict)), key=lambda verdict: verdict.steps_ratio is None
    )
    rows = [[f"[{v.title}](#{v.claim})", v.source, f"**{v.outcome}**", v.measured] for v in order]
    parts.append(
        markdown(Table(columns=["claim", "in the paper", "verdict", "measured"], rows=rows), right=False)
    )
    for verdict in order:
        parts.append(f"## {verdict.claim}\n\n{verdict.title} ({verdict.source}).\n")
        parts.append(
            f"Expected: {verdict.expected}.\n\nMeasured: **{verdict.outcome}**. {verdict.measured}\n"
        )
        for name in ("figure-1a", "figure-1bc") if verdict.claim == "figure-1" else (verdict.claim,):
            if (DOCS / "images" / f"{name}.png").exists():
                parts.append(f"![{verdict.title}](images/{name}.png)\n")
        for title, table in verdict.tables.items():
            parts.append(f"{title}:\n\n{markdown(table)}" + (f"\n{table.note}\n" if table.note else ""))
        parts.append(
            "What the paper leaves open and we chose:\n\n"
            + "\n".join(f"- {c}" for c in verdict.choices)
            + "\n"
        )
    return "\n".join(parts)


def markdown(table: Table, right: bool = True) -> str:
    """A table in Markdown; all columns but the first stand right, where they hold numbers."""
    rule = ["---"] + ["--:" if right else "---"] * (len(table.columns) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [table.columns, rule, *table.rows]) + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take(Path(sys.argv[1]))
    (DOCS / "experiments.md").write_text(page())
