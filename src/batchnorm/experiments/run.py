"""Run an experiment: train what the claims need, record it, judge, draw the page; stop and continue anywhere."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, Protocol

from batchnorm import report
from batchnorm.experiments.claim import Claim, Curve, J, Job, S
from batchnorm.records import Evaluation, RecordFile, Result, Run, Verdict
from batchnorm.training.interruption import Interruption
from batchnorm.training.machine import machine, versions
from batchnorm.training.tensorboard import EventFiles
from batchnorm.training.workers import Make, Outcome, Progress, WorkerDied, Workers


class Stopped(Exception):
    """The run was interrupted; everything up to now is in its folder."""


class Watcher(Protocol):
    """Who is told how the run goes; the command line shows a progress bar."""

    def planned(self, jobs: Mapping[str, Job]) -> None:
        """These networks are about to be trained, in addition to those before."""

    def progress(self, progress: Progress) -> None:
        """A network has come this far."""

    def ended(self, job: str, result: Result) -> None:
        """A network has ended."""

    def stopping(self) -> None:
        """The user asked to stop; checkpoints are being written."""


class Experiment(Generic[S, J]):
    """Claims of the paper, tested together in one run folder.

    title: what the page is called.
    claims: judged in this order, so that the last verdict is the last record.
    data: the data set in words.
    make: what a worker makes of a job.
    """

    def __init__(
        self, name: str, title: str, claims: Sequence[Claim[S, J]], data: str, make: Make[J]
    ) -> None:
        self.name, self.title, self.claims, self.data, self.make = name, title, claims, data, make

    def run(
        self,
        settings: S,
        folder: Path,
        command: str,
        watcher: Watcher,
        workers: int | None = None,
    ) -> list[Verdict]:
        """Run, or continue, in `folder`; return the verdicts, which are also the last records.

        command: the command line, for the record.

        Raises: Stopped after Ctrl-C or SIGTERM, when records, page and checkpoints have been written.
        """
        with ExitStack() as stack:
            pools: list[Workers[J]] = []  # once there is one; before, nothing is in training

            def stop(_: signal.Signals) -> None:
                for pool in pools:
                    pool.stop()
                watcher.stopping()

            interrupted = stack.enter_context(Interruption(stop))
            records = stack.enter_context(RecordFile(folder / "records.jsonl"))
            if not records.records:
                records.append(self._head(settings, command))
            events = stack.enter_context(EventFiles(folder / "tensorboard"))
            pool = stack.enter_context(Workers(self.make, folder / "checkpoints", workers))
            pools.append(pool)
            curves: dict[str, Curve[J]] = {}
            while not interrupted.seen:
                jobs = self._jobs(settings, curves)
                if not jobs:
                    break
                watcher.planned(jobs)
                try:
                    self._train(jobs, curves, pool, records, events, watcher)
                except WorkerDied:  # whoever stopped us may have stopped them too
                    if not interrupted.seen:
                        raise
            for claim in self.claims:
                for chart in claim.charts(settings, curves):
                    records.append(chart)
            verdicts = [claim.verdict(settings, curves) for claim in self.claims]
            if records.records[-len(verdicts) :] != verdicts:
                for verdict in verdicts:
                    records.append(verdict)
            report.build(folder)
            if any(verdict.outcome == "incomplete" for verdict in verdicts):
                raise Stopped
        return verdicts

    def _jobs(self, settings: S, curves: dict[str, Curve[J]]) -> dict[str, J]:
        """What the claims need and nobody has trained yet, the longest first so that no core waits at the end."""
        wanted: dict[str, J] = {}
        for claim in self.claims:
            wanted |= claim.jobs(settings, curves)
        missing = [(name, config) for name, config in wanted.items() if name not in curves]
        return dict(sorted(missing, key=lambda job: -job[1].cost))

    def _train(
        self,
        jobs: dict[str, J],
        curves: dict[str, Curve[J]],
        pool: Workers[J],
        records: RecordFile,
        events: EventFiles,
        watcher: Watcher,
    ) -> None:
        """Train `jobs` into `curves`. Records are written network by network in the order of `jobs`.

        So the file is the same every time, though two processes never end in the same order.
        """
        outcomes: dict[str, Outcome] = {}
        waiting = list(jobs)
        for message in pool.train(jobs):
            if isinstance(message, Progress):
                watcher.progress(message)
                if message.evaluation is not None:
                    events.add(message.evaluation)
                continue
            outcomes[message.job] = message
            if message.finished:
                watcher.ended(message.job, _result(message))
            while waiting and waiting[0] in outcomes:
                outcome = outcomes[waiting.pop(0)]
                for record in outcome.records:
                    records.append(record)
                evaluations = [record for record in outcome.records if isinstance(record, Evaluation)]
                if evaluations:
                    result = _result(outcome) if outcome.finished else None
                    curves[outcome.job] = Curve(
                        jobs[outcome.job], evaluations, result, pool.checkpoint(outcome.job)
                    )

    def _head(self, settings: S, command: str) -> Run:
        return Run(
            experiment=self.name,
            title=self.title,
            command=command,
            config=settings.model_dump(mode="json"),
            seeds=list(range(settings.seeds)),
            versions=versions(),
            machine=machine(),
            data=self.data,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _result(outcome: Outcome) -> Result:
    last = outcome.records[-1]
    assert isinstance(last, Result)
    return last
