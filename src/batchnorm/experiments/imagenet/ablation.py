"""Which change of section 4.2.1 matters: BN-x5 with each of the seven left out, an ablation that the paper lacks.

Claim     no change is better left out
Source    Ioffe & Szegedy 2015, section 4.2.1; for shuffling "about 1 %", the others without a number
Expected  no network with one change left out is more accurate than BN-x5 by more than BN-x5's standard deviation
Cost      seven more networks a seed, of a fifth of Inception's steps
Measured  docs/experiments.md
"""

from __future__ import annotations

import statistics

from batchnorm.experiments.claim import Claim, Curves, Finding, seeds_note, spread
from batchnorm.experiments.imagenet import variants
from batchnorm.experiments.imagenet.inception_settings import ImagenetSettings
from batchnorm.experiments.imagenet.variants import job
from batchnorm.records import Chart, Table
from batchnorm.training import recipe
from batchnorm.training.config import Config

_RECIPE = "bn-x5"
_LRN = 5  # the step that removes local response normalization; without it the network has to have LRN


class Ablation(Claim[ImagenetSettings, Config]):
    """BN-x5, and BN-x5 with one of the seven changes left out."""

    name = "ablation"
    title = "None of the changes that come with batch normalization is better left out"
    source = "section 4.2.1"
    expected = (
        "no network with one change left out is more accurate than BN-x5 by more than a standard "
        "deviation over BN-x5's seeds"
    )

    def choices(self, settings: ImagenetSettings) -> list[str]:
        """See `Claim.choices`."""
        return [
            "To leave out the removal of local response normalization is to have it, where GoogLeNet does.",
            "Left out one at a time; the changes may stand in for one another.",
        ]

    def jobs(self, settings: ImagenetSettings, curves: Curves) -> dict[str, Config]:
        """BN-x5 with all changes, and without each, for every seed."""
        jobs = variants.sweep(settings)
        rate = variants.best_rate(settings, curves)
        if rate is None:
            return jobs
        for seed in range(settings.seeds):
            for number in (None, *_steps()):
                without = () if number is None else (number,)
                config = variants.variant(settings, _RECIPE, rate, seed, without)
                if number == _LRN:
                    config = config.with_values("model", local_response_norm=True)
                jobs[_job(number, seed)] = config
        return jobs

    def charts(self, settings: ImagenetSettings, curves: Curves) -> list[Chart]:
        """None; the table is enough."""
        return []

    def find(self, settings: ImagenetSettings, curves: Curves) -> Finding:
        """The best accuracy with each change left out, beside that with all."""
        seeds = range(settings.seeds)
        best = {
            number: [curves[_job(number, seed)].best_accuracy for seed in seeds]
            for number in (None, *_steps())
        }
        baseline = statistics.fmean(best[None])
        noise = statistics.stdev(best[None]) if settings.seeds > 1 else 0.0
        differences = {
            number: statistics.fmean(accuracies) - baseline
            for number, accuracies in best.items()
            if number is not None
        }
        rows = [["all seven", spread(best[None], "{:.2%}"), ""]]
        rows += [
            [f"without {number}, {_steps()[number]}", spread(best[number], "{:.2%}"), f"{100 * by:+.2f}"]
            for number, by in differences.items()
        ]
        better = [_steps()[number] for number, by in differences.items() if by > noise]
        worst = min(differences, key=lambda number: differences[number])
        return Finding(
            not better,
            f"BN-x5 ends at {spread(best[None], '{:.2%}')}. It misses most the change {_steps()[worst]!r}: "
            f"{100 * differences[worst]:+.2f} points without it. "
            + (
                f"It is better off without {', '.join(better)}."
                if better
                else "No change is better left out."
            ),
            {
                "Best accuracy of BN-x5 with one change left out": Table(
                    columns=["", "best", "points"],
                    rows=rows,
                    note=f"{seeds_note(settings.seeds)}.",
                )
            },
        )


def _steps() -> dict[int, str]:
    return {step.number: step.name for step in recipe.steps(recipe.VARIANTS[_RECIPE].rate)}


def _job(number: int | None, seed: int) -> str:
    return job(_RECIPE if number is None else f"{_RECIPE}-without-{number}", seed)
