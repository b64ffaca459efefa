"""Write docs/experiments.md from what was measured, so that no number in it is typed by hand.

python docs/experiments.py RUN...  take the verdicts and pictures of these runs, then write the page
python docs/experiments.py         write the page again from docs/measured/
"""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from batchnorm.records import Run, Table, Verdict, read

DOCS = Path(__file__).parent
MEASURED = DOCS / "measured"

INTRODUCTION = """# Experiments

The claims of the paper, the expected results, and the results measured here. A verdict may be "not seen here". This
page is written by `docs/experiments.py` from the records of the runs named below, in `docs/measured/`. On the same
machine the same command gives the same numbers.
"""

# By the name of the file in docs/measured.
PARTS = {
    "mnist": "Digits: section 4.1",
    "imagenet": "Inception: section 4.2",
    "imagenet-quick": "Inception, quick run",
    "ablation": "Which of the changes matters: section 4.2.1",
    "ensemble": "The ensemble: section 4.2.3",
    "ensemble-quick": "The ensemble, quick run",
}
SCALED = (
    "A scaled run, not ImageNet: {width:g} times the channels, {steps:,} steps of Inception where the paper has 31 "
    "million. `--data DIR` is for the paper's own scale."
)
# Explanations of verdicts, by part and claim.
WHY = {
    ("imagenet", "figure-3"): (
        "Likely reasons why BN-x5 does not reach the target, from these records: a fifth of Inception's steps is less "
        "than one pass over the images, where in the paper it is a hundred and fifty; and the learning rate, which "
        "decays six times faster, is too small at the end. The plain network has less of a handicap than in the "
        "paper: its rate is the best of several and its initial weights are scaled for ReLUs (He et al. 2015), so "
        "five times that rate is about the largest that helps, and thirty times is too much. Results that do not "
        "depend on the rate are as in the paper: BN-Baseline, which differs from Inception only by BN, is ahead from "
        "the first steps to the last."
    ),
    ("ensemble", "ensemble"): (
        "By one crop the ensemble is better than the best of its networks; by 144 crops, as in the paper, it is not. "
        "The crops reduce accuracy here, while on ImageNet they increase it: clothes fill their frame of 28 pixels, so "
        "crops cut parts off, and the networks were trained on whole images."
    ),
}
# The figures of claims whose files have other names.
PICTURES = {"figure-1": ("figure-1a", "figure-1bc"), "figure-3": ("figure-2",)}


def take(run: Path) -> None:
    """Copy the run record, the last verdict of every claim and their figures."""
    records = list(read(run / "records.jsonl"))
    verdicts = {record.claim: record for record in records if isinstance(record, Verdict)}
    (head,) = (record for record in records if isinstance(record, Run))
    # without the output folder
    command = re.sub(r" --(?:out(?:=| )(?:'[^']*'|\S+)|resume)", "", head.command)
    head = head.model_copy(update={"command": command})
    part = _part(head, verdicts)
    MEASURED.mkdir(exist_ok=True)
    kept = [head, *verdicts.values()]
    (MEASURED / f"{part}.jsonl").write_text("".join(record.model_dump_json() + "\n" for record in kept))
    for claim in verdicts:
        for name in _pictures(claim):
            if (run / "figures" / f"{name}.png").exists():
                shutil.copy(run / "figures" / f"{name}.png", _image(part, name))


def page() -> str:
    """The page, from docs/measured."""
    heads, verdicts = {}, {}
    for part in PARTS:
        if (MEASURED / f"{part}.jsonl").exists():
            head, *found = read(MEASURED / f"{part}.jsonl")
            assert isinstance(head, Run)
            heads[part] = head
            verdicts[part] = sorted(
                (verdict for verdict in found if isinstance(verdict, Verdict)),
                key=lambda verdict: (verdict.steps_ratio is None, verdict.claim != "figure-3"),
            )
    rows = [
        [
            f"[{verdict.title}](#{_anchor(part, verdict)})",
            verdict.source,
            f"**{verdict.outcome}**",
            verdict.measured,
        ]
        for part, found in verdicts.items()
        for verdict in found
    ]
    columns = ["claim", "in the paper", "verdict", "measured"]
    parts = [INTRODUCTION, markdown(Table(columns=columns, rows=rows), right=False)]
    for part, head in heads.items():
        parts += _of(part, head, verdicts[part])
    return "\n".join(parts)


def _of(part: str, head: Run, verdicts: list[Verdict]) -> Iterator[str]:
    about = f"{head.data}."
    if head.config.get("scale", "paper") != "paper":
        about += " " + SCALED.format(**head.config)
    versions = ", ".join(f"{name} {version}" for name, version in head.versions.items())
    yield f"## {PARTS[part]}\n\n{about}\n\n```bash\n{head.command}\n```\n\n{head.machine}; {versions}.\n"
    for verdict in verdicts:
        yield f"### {_anchor(part, verdict)}\n\n{verdict.title} ({verdict.source}).\n"
        yield f"Expected: {verdict.expected}.\n\nMeasured: **{verdict.outcome}**. {verdict.measured}\n"
        if why := WHY.get((part, verdict.claim)):
            yield f"{why}\n"
        for name in _pictures(verdict.claim):
            image = _image(part, name)
            if image.exists():
                yield f"![{verdict.title}]({image.relative_to(DOCS).as_posix()})\n"
        for caption, table in verdict.tables.items():
            yield f"{caption}:\n\n{markdown(table)}" + (f"\n{table.note}\n" if table.note else "")
        chosen = "\n".join(f"- {choice}" for choice in verdict.choices)
        yield f"What the paper leaves open and we chose:\n\n{chosen}\n"


def _part(head: Run, verdicts: dict[str, Verdict]) -> str:
    name = "ablation" if set(verdicts) == {"ablation"} else head.experiment
    return name + ("-quick" if head.config.get("scale") == "quick" else "")


def _anchor(part: str, verdict: Verdict) -> str:
    return f"{verdict.claim}-quick" if part.endswith("-quick") else verdict.claim


def _pictures(claim: str) -> tuple[str, ...]:
    return PICTURES.get(claim, (claim,))


def _image(part: str, name: str) -> Path:
    return DOCS / "images" / (f"{name}-quick.png" if part.endswith("-quick") else f"{name}.png")


def markdown(table: Table, right: bool = True) -> str:
    """A table in Markdown; all columns but the first stand right, where they hold numbers."""
    rule = ["---"] + ["--:" if right else "---"] * (len(table.columns) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [table.columns, rule, *table.rows]) + "\n"


if __name__ == "__main__":
    for run in sys.argv[1:]:
        take(Path(run))
    (DOCS / "experiments.md").write_text(page())
