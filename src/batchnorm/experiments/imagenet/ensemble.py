"""Figure 4: an ensemble of six networks is better than any one of them.

Claim     the mean of six BN-x30 networks' class probabilities has a lower error than any network alone
Source    Ioffe & Szegedy 2015, section 4.2.3, figure 4
Expected  the ensemble's accuracy over 144 crops is above that of its best network, by one crop or by 144
Cost      quick: ten minutes on two cores; scaled: half an hour
Measured  docs/experiments.md
"""

from __future__ import annotations

from typing import Any

from batchnorm.experiments.claim import Claim, Curves, Finding, percent
from batchnorm.experiments.imagenet import variants
from batchnorm.experiments.imagenet.ensemble_settings import EnsembleSettings
from batchnorm.records import Chart, Table
from batchnorm.training.config import Config
from batchnorm.training.evaluation import Crops, Predictions
from batchnorm.training.prediction import CROPS, Prediction, load_predictions

# "Each was based on BN-x30, modified via some of": larger initial weights in the convolutions, Dropout of 5 or 10 %,
# per-activation BN in the last hidden layers. Which network had which the paper does not say.
_LAST = ("5a", "5b")
MEMBERS: tuple[dict[str, Any], ...] = (
    {"init_gain": 2.0},
    {"dropout": 0.05},
    {"dropout": 0.1},
    {"per_activation": _LAST},
    {"init_gain": 2.0, "dropout": 0.05, "per_activation": _LAST},
    {"init_gain": 2.0, "dropout": 0.1},
)
# Figure 4: top-1 and top-5 accuracy, 100 % less the errors.
PAPER_SINGLE, PAPER_CROPS, PAPER_ENSEMBLE = (0.748, 0.9218), (0.7801, 0.9418), (0.799, 0.951)


class Ensemble(Claim[EnsembleSettings, Config | Prediction]):
    """Six modified BN-x30 networks: single crop, 144 crops, and the mean of all of their class probabilities.

    validation: number of images in the validation set.
    """

    name = "ensemble"
    title = "Six networks together are better than the best of them"
    source = "section 4.2.3, figure 4"
    expected = (
        f"over {CROPS} crops the ensemble's accuracy is above that of its best network, by one crop or by "
        f"{CROPS}"
    )

    def __init__(self, validation: int) -> None:
        self._validation = validation

    def choices(self, settings: EnsembleSettings) -> list[str]:
        """See `Claim.choices`."""
        members = "; ".join(
            f"{number}: {_describe_changes(changes)}" for number, changes in enumerate(MEMBERS, 1)
        )
        return [
            f"BN-x30 at {30 * settings.rate:g}, trained for {variants.steps(settings, 'bn-x30'):,} steps, each from a "
            f"seed of its own. Modified: {members}.",
            f"{variants.describe_crops(settings)} The {CROPS} crops of a test image cover 40 % to all of it.",
            f"The rate is 30 times {settings.rate:g}"
            + (
                "."
                if settings.scale == "paper"
                else ", not 30 times Inception's best of figure 3: networks of so few epochs do not bear that."
            ),
            f"Accuracies are those of {settings.images or self._validation:,} validation images, chosen once at "
            "random, by population statistics.",
            "Initial weights are 'larger' by a factor of 2.",
        ]

    def jobs(self, settings: EnsembleSettings, curves: Curves) -> dict[str, Config | Prediction]:
        """The six networks, and the prediction of each that has been trained."""
        jobs: dict[str, Config | Prediction] = {}
        for number, changes in enumerate(MEMBERS, 1):
            config = variants.variant(settings, "bn-x30", settings.rate, number - 1)
            config = config.with_values("model", **changes)
            jobs[_network(number)] = config
            if _network(number) in curves and curves[_network(number)].result is not None:
                images = min(settings.images or self._validation, self._validation)
                jobs[_prediction(number)] = Prediction(network=_network(number), config=config, images=images)
        return jobs

    def charts(self, settings: EnsembleSettings, curves: Curves) -> list[Chart]:
        """None; the table is enough."""
        return []

    def find(self, settings: EnsembleSettings, curves: Curves) -> Finding:
        """Top-1 and top-5 accuracy of every network by one crop and by 144, and of their mean."""
        networks = []
        for number in range(1, len(MEMBERS) + 1):
            path = curves[_prediction(number)].checkpoint
            assert path is not None
            networks.append(load_predictions(path))
        ensemble_predictions = {
            crops: Predictions.mean([predictions[crops] for predictions in networks]) for crops in networks[0]
        }
        rows = [
            [f"network {number}", *_accuracies(predictions)] for number, predictions in enumerate(networks, 1)
        ]
        rows.append(["ensemble of all six", *_accuracies(ensemble_predictions)])
        rows.append(["paper: one network", *_cells(PAPER_SINGLE, PAPER_CROPS)])
        rows.append(["paper: ensemble", "–", "–", *_cells(PAPER_ENSEMBLE)])
        best = {
            crops: max(predictions[crops].score.accuracy for predictions in networks)
            for crops in ensemble_predictions
        }
        ensemble = {crops: predictions.score.accuracy for crops, predictions in ensemble_predictions.items()}
        return Finding(
            ensemble[CROPS] > max(best.values()),
            f"The ensemble gets {percent(ensemble[CROPS], 2)} right over {CROPS} crops and {percent(ensemble[1], 2)} "
            f"by a single one; the best of its networks {percent(best[CROPS], 2)} over {CROPS} crops and "
            f"{percent(best[1], 2)} by a single one. {ensemble_predictions[1].score.images:,} images.",
            {
                "Accuracy of the networks and of the ensemble": Table(
                    columns=["network", "single crop", "top-5", f"{CROPS} crops", "top-5"],
                    rows=rows,
                    note="The ensemble is the arithmetic mean of the class probabilities, as is a network over crops.",
                )
            },
        )


def _accuracies(predictions: dict[Crops, Predictions]) -> list[str]:
    scores = [predictions[crops].score for crops in (1, CROPS)]
    return _cells(*((score.accuracy, score.accuracy_top5) for score in scores))


def _cells(*accuracies: tuple[float, float]) -> list[str]:
    return [percent(accuracy, 2) for pair in accuracies for accuracy in pair]


def _describe_changes(changes: dict[str, Any]) -> str:
    texts = {
        "init_gain": "initial weights × {:g}",
        "dropout": "dropout {:.0%}",
        "per_activation": "per-activation BN in the last modules",
    }
    described = (
        texts[name].format(value) if not isinstance(value, tuple) else texts[name]
        for name, value in changes.items()
    )
    return ", ".join(described).replace("%", " %")


def _network(number: int) -> str:
    return f"member-{number}"


def _prediction(number: int) -> str:
    return f"member-{number}-{CROPS}-crops"
