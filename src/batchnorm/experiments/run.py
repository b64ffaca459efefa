"""Run an experiment: train the networks that the claims need, record, judge and write the report; resumable."""

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
from batchnorm.training.workers import Outcome, Progress, TrainerFactory, WorkerDied, Workers


class Stopped(Exception):
    """The run was interrupted; its records and checkpoints have been written."""


class Callback(Protocol):
    """Called on the events of a run; the command line shows a progress bar."""

    def on_jobs(self, jobs: Mapping[str, Job]) -> None:
        """`jobs` are about to be trained, in addition to earlier ones."""

    def on_progress(self, progress: Progress) -> None:
        """A network has made progress."""

    def on_result(self, job: str, result: Result) -> None:
        """The training of a network has ended."""

    def on_stop_request(self) -> None:
        """The user asked to stop; checkpoints are being written."""


class Experiment(Generic[S, J]):
    """Claims of the paper, tested together in one run folder.

    title: of the report.
    claims: judged in this order; the last verdict is the last record.
    data: a description of the data set.
    make_trainer: creates the trainer of a job, in a worker.
    """

    def __init__(
        self, name: str, title: str, claims: Sequence[Claim[S, J]], data: str, make_trainer: TrainerFactory[J]
    ) -> None:
        self.name, self.title, self.claims, self.data, self.make_trainer = (
            name,
            title,
            claims,
            data,
            make_trainer,
        )

    def run(
        self,
        settings: S,
        folder: Path,
        command: str,
        callback: Callback,
        workers: int | None = None,
    ) -> list[Verdict]:
        """Run, or resume, in `folder`; return the verdicts, which are also the last records.

        command: the command line, for the run record.

        Raises: Stopped after Ctrl-C or SIGTERM, when records, report and checkpoints have been written.
        """
        with ExitStack() as stack:
            pools: list[Workers[J]] = []  # empty until the pool exists

            def stop(_: signal.Signals) -> None:
                for pool in pools:
                    pool.stop()
                callback.on_stop_request()

            interrupted = stack.enter_context(Interruption(stop))
            records = stack.enter_context(RecordFile(folder / "records.jsonl"))
            if not records.records:
                records.append(self._head(settings, command))
            events = stack.enter_context(EventFiles(folder / "tensorboard"))
            pool = stack.enter_context(Workers(self.make_trainer, folder / "checkpoints", workers))
            pools.append(pool)
            curves: dict[str, Curve[J]] = {}
            while not interrupted.received:
                jobs = self._jobs(settings, curves)
                if not jobs:
                    break
                callback.on_jobs(jobs)
                try:
                    self._train(jobs, curves, pool, records, events, callback)
                except WorkerDied:  # the signal that stopped this process may have killed the workers
                    if not interrupted.received:
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
        """The jobs that the claims need and that have not run, the longest first, to keep all cores busy."""
        jobs: dict[str, J] = {}
        for claim in self.claims:
            jobs |= claim.jobs(settings, curves)
        missing = [(name, config) for name, config in jobs.items() if name not in curves]
        return dict(sorted(missing, key=lambda job: -job[1].cost))

    def _train(
        self,
        jobs: dict[str, J],
        curves: dict[str, Curve[J]],
        pool: Workers[J],
        records: RecordFile,
        events: EventFiles,
        callback: Callback,
    ) -> None:
        """Train `jobs` and add their `curves`. Records are written network by network, in the order of `jobs`.

        This makes the file deterministic although networks end in any order.
        """
        outcomes: dict[str, Outcome] = {}
        waiting = list(jobs)
        for message in pool.train(jobs):
            if isinstance(message, Progress):
                callback.on_progress(message)
                if message.evaluation is not None:
                    events.add(message.evaluation)
                continue
            outcomes[message.job] = message
            if message.finished:
                callback.on_result(message.job, _result(message))
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
