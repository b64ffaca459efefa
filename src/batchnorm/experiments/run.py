"""Run an experiment: train what the claims need, record it, judge, draw the page; stop and continue anywhere."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Protocol

from batchnorm import report
from batchnorm.experiments.claim import Claim, Curve, Settings
from batchnorm.experiments.tensorboard import EventFiles
from batchnorm.records import Evaluation, RecordFile, Result, Run, Verdict
from batchnorm.training.digits import Training
from batchnorm.training.machine import machine, versions
from batchnorm.training.workers import Outcome, Progress, WorkerDied, Workers


class Stopped(Exception):
    """The run was interrupted; everything up to now is in its folder."""


class Watcher(Protocol):
    """Who is told how the run goes; the command line shows a progress bar."""

    def planned(self, jobs: dict[str, Training]) -> None:
        """These networks are about to be trained, in addition to those before."""

    def progress(self, progress: Progress) -> None:
        """A network has come this far."""

    def ended(self, job: str, result: Result) -> None:
        """A network has ended."""

    def stopping(self) -> None:
        """The user asked to stop; checkpoints are being written."""


class Experiment:
    """Claims of the paper, tested together in one run folder.

    title: what the page is called.
    claims: judged in this order, so that the last verdict is the last record.
    data: the data set in words.
    """

    def __init__(self, name: str, title: str, claims: Sequence[Claim], data: str) -> None:
        self.name, self.title, self.claims, self.data = name, title, claims, data

    def run(
        self,
        settings: Settings,
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
            interrupted = stack.enter_context(_Interruption(watcher))
            records = stack.enter_context(RecordFile(folder / "records.jsonl"))
            if not records.records:
                records.append(self._head(settings, command))
            events = stack.enter_context(EventFiles(folder / "tensorboard"))
            pool = stack.enter_context(Workers(settings.data, folder / "checkpoints", workers))
            interrupted.pool = pool
            curves: dict[str, Curve] = {}
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

    def _jobs(self, settings: Settings, curves: dict[str, Curve]) -> dict[str, Training]:
        """What the claims need and nobody has trained yet, the longest first so that no core waits at the end."""
        wanted: dict[str, Training] = {}
        for claim in self.claims:
            wanted |= claim.jobs(settings, curves)
        missing = [(name, config) for name, config in wanted.items() if name not in curves]
        return dict(sorted(missing, key=lambda job: -job[1].cost))

    def _train(
        self,
        jobs: dict[str, Training],
        curves: dict[str, Curve],
        pool: Workers,
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
                    curves[outcome.job] = Curve(jobs[outcome.job], evaluations, result)

    def _head(self, settings: Settings, command: str) -> Run:
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


class _Interruption:
    """Turns Ctrl-C and SIGTERM into a polite stop; a second one is as rude as ever."""

    def __init__(self, watcher: Watcher) -> None:
        self.seen = False
        self.pool: Workers | None = None  # once there is one; before, nothing is in training
        self._watcher = watcher

    def __enter__(self) -> _Interruption:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True
        if self.pool is not None:
            self.pool.stop()
        self._watcher.stopping()
