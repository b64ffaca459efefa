"""A sweep of both networks over the values of one setting and several seeds, and claims that rely on sweeps."""

from __future__ import annotations

import statistics
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from batchnorm.experiments.claim import Claim, Curves, label, role, spread
from batchnorm.experiments.mnist.digits_settings import DigitsSettings
from batchnorm.records import Chart, Line, Panel, Table
from batchnorm.training.digits_trainer import Training


@dataclass(frozen=True)
class Sweep:
    """The final test accuracy of both networks against one setting.

    name: prefix of the names of its jobs.
    title: of its panel.
    setting: label of the setting.
    values: of the setting, increasing.
    training: the configuration of one network, from whether it has BN, the value and the seed.
    """

    name: str
    title: str
    setting: str
    values: Sequence[float]
    training: Callable[[bool, float, int], Training]

    def jobs(self, settings: DigitsSettings) -> dict[str, Training]:
        """Every network of the sweep, by name."""
        return {
            self._job(bn, value, seed): self.training(bn, value, seed)
            for value in self.values
            for bn in (True, False)
            for seed in range(settings.seeds)
        }

    def accuracies(self, settings: DigitsSettings, curves: Curves, bn: bool, value: float) -> list[float]:
        """Final test accuracies over seeds; of a diverged network, the accuracy when it diverged."""
        results = [curves[job].result for job in self._names(settings, bn, value) if job in curves]
        return [result.accuracy for result in results if result is not None]

    def median(self, settings: DigitsSettings, curves: Curves, bn: bool, value: float) -> float:
        """The median over seeds of the final test accuracy."""
        return statistics.median(self.accuracies(settings, curves, bn, value))

    def panel(self, settings: DigitsSettings, curves: Curves) -> Panel:
        """Median over seeds as a line, all seeds as a band."""
        lines = []
        for bn in (True, False):
            by_value = {v: self.accuracies(settings, curves, bn, v) for v in self.values}
            by_value = {value: accuracies for value, accuracies in by_value.items() if accuracies}
            lines.append(
                Line(
                    label=label(bn),
                    role=role(bn),
                    x=list(by_value),
                    y=[statistics.median(accuracies) for accuracies in by_value.values()],
                    low=[min(accuracies) for accuracies in by_value.values()],
                    high=[max(accuracies) for accuracies in by_value.values()],
                    markers=True,
                )
            )
        return Panel(
            title=self.title,
            x_label=self.setting,
            y_label="test accuracy at the end",
            x_log=True,
            y_range=(0.0, 1.0),
            y_percent=True,
            lines=lines,
        )

    def table(self, settings: DigitsSettings, curves: Curves) -> Table:
        """A row for every value: mean and standard deviation over seeds of the final test accuracy."""
        rows = [
            [
                f"{value:g}",
                *(spread(self.accuracies(settings, curves, bn, value), "{:.1%}") for bn in (False, True)),
            ]
            for value in self.values
        ]
        return Table(columns=[self.setting, label(False), label(True)], rows=rows)

    def _names(self, settings: DigitsSettings, bn: bool, value: float) -> list[str]:
        return [self._job(bn, value, seed) for seed in range(settings.seeds)]

    def _job(self, bn: bool, value: float, seed: int) -> str:
        return f"{self.name}-{role(bn)}-{value:g}-seed{seed}"


class SweepClaim(Claim[DigitsSettings, Training]):
    """A claim that relies on one or more sweeps, drawn side by side."""

    @abstractmethod
    def sweeps(self, settings: DigitsSettings) -> list[Sweep]:
        """The sweeps."""

    @abstractmethod
    def picture(self, settings: DigitsSettings) -> str:
        """The title of the figure."""

    def jobs(self, settings: DigitsSettings, curves: Curves) -> dict[str, Training]:
        """Every value, with and without BN, for every seed."""
        return {name: job for sweep in self.sweeps(settings) for name, job in sweep.jobs(settings).items()}

    def charts(self, settings: DigitsSettings, curves: Curves) -> list[Chart]:
        """Final accuracy against the setting, a panel a sweep."""
        return [
            Chart(
                claim=self.name,
                name=self.name,
                title=self.picture(settings),
                caption="Line: median over the seeds; band: all of them. Chance is about 10 %.",
                panels=[sweep.panel(settings, curves) for sweep in self.sweeps(settings)],
            )
        ]
