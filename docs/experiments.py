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

What the paper claims, what was expected, and what was measured here. A verdict may be "not seen here". This page is
written by `docs/experiments.py` from the records of the runs named below, in `docs/measured/`. On the same machine the
same command gives the same numbers.
"""

# By the name of the file in docs/measured.
PARTS = {
    "mnist": "Digits: section 4.1",
    "imagenet": "Inception: section 4.2",
    "imagenet-quick": "Inception in a hurry",
    "ablation": "Which of the changes matters: section 4.2.1",
    "ensemble": "The ensemble: section 4.2.3",
    "ensemble-quick": "The ensemble in a hurry",
}
SCALED = (
    "A scaled run, not ImageNet: {width:g} times the channels, {steps:,} steps of Inception where the paper has 31 "
    "million. `--data DIR` is for the paper's own scale."
)
# What the records suggest beyond the verdict, by part and claim.
WHY = {
    ("imagenet", "figure-3"): (
        "Why BN-x5 does not get there, as far as these records tell. Its fifth of Inception's steps is less than one "
        "pass over the images, where the paper's is a hundred and fifty: it runs out of images and, its rate decaying "
        "six times faster, of learning rate. And the plain network has less of a handicap than the paper's: its rate "
        "is the best of several and its initial weights are scaled for ReLUs (He et al. 2015), so five times that "
        "rate is about as much as helps, and thirty times is too much. What does not hang on the rate is as in the "
        "paper: BN-Baseline, which differs from Inception by nothing but BN, is ahead from the first steps to the last."
    ),
    ("ensemble", "ensemble"): (
        "By one crop the ensemble is better than the best of its networks, by 144, as the paper has it, it is not. The "
        "crops cost accuracy here, where on ImageNet they add some: clothes fill their frame of 28 pixels, crops cut "
        "pieces off, and the networks have been trained on whole images."
    ),
}
# The pictures of a claim, where they are not named after it.
PICTURES = {"figure-1": ("figure-1a", "figure-1bc"), "figure-3": ("figure-2",)}


def take(run: Path) -> None:
    """Copy the run's head, its last verdict of every claim and their pictures."""
    records = list(read(run / "records.jsonl"))
    verdicts = {record.claim: record for record in records if isinstance(record, Verdict)}
    (head,) = (record for record in records if isinstance(record, Run))
    # where it was written to is nobody's business
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
