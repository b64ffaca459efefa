"""Runs side by side: real processes, stopped, killed and continued."""

import os
import signal
import time
from functools import partial

import pytest

from batchnorm.records import Result
from batchnorm.training.digits_trainer import Training, digits_trainer
from batchnorm.training.workers import Outcome, Progress, WorkerDied, Workers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forking")]

MAKE = partial(digits_trainer, "mnist-10k")
JOBS = {
    f"{'bn' if bn else 'plain'}-{steps}": Training(batch_norm=bn, rate=0.1, steps=steps, seed=0)
    for bn, steps in ((True, 400), (False, 700), (True, 30))
}


def outcomes(workers: Workers[Training], stop_after: int | None = None) -> dict[str, Outcome]:
    found = {}
    for message in workers.train(JOBS):
        if isinstance(message, Outcome):
            found[message.job] = message
        elif stop_after is not None and message.step >= stop_after:
            workers.stop()
    return found


def lines(outcome: Outcome) -> list[str]:
    return [record.model_dump_json(exclude={"seconds"}) for record in outcome.records]


def test_a_stopped_run_continues_to_the_same_records(tmp_path):
    with Workers(MAKE, tmp_path / "a", count=2) as workers:
        whole = outcomes(workers)
    assert all(outcome.finished for outcome in whole.values())
    with Workers(MAKE, tmp_path / "b", count=2) as workers:
        part = outcomes(workers, stop_after=50)
    assert not all(outcome.finished for outcome in part.values())
    for job, outcome in part.items():
        assert lines(outcome) == lines(whole[job])[: len(outcome.records)]
    with Workers(MAKE, tmp_path / "b", count=1) as workers:
        rest = outcomes(workers)
    assert {job: lines(outcome) for job, outcome in rest.items()} == {
        job: lines(outcome) for job, outcome in whole.items()
    }


def test_two_networks_train_in_two_processes_and_a_killed_one_is_reported(tmp_path):
    with Workers(MAKE, tmp_path, count=2) as workers:
        endless = {name: Training(batch_norm=False, rate=0.1, steps=10**6, seed=0) for name in ("a", "b")}

        def kill_one_when_both_run() -> None:
            running: set[str] = set()
            for message in workers.train(endless):
                assert isinstance(message, Progress)
                running.add(message.job)
                if running == {"a", "b"}:
                    processes = list(workers._pool._processes)
                    assert len(processes) == 2
                    os.kill(processes[0], signal.SIGKILL)
                    running.add("one is killed")

        with pytest.raises(WorkerDied, match="killed"):
            kill_one_when_both_run()


def test_a_checkpoint_is_written_while_training(tmp_path, monkeypatch):
    # the interval is read in the worker, which is a fresh process: so wait for the real one, once
    with Workers(MAKE, tmp_path, count=1) as workers:
        job = {"long": Training(batch_norm=False, rate=0.1, steps=10**6, seed=0)}
        started = time.monotonic()
        for _ in workers.train(job):
            if (tmp_path / "long.pt").exists():
                workers.stop()
            assert time.monotonic() - started < 60


def test_an_error_in_a_worker_arrives_as_itself(tmp_path):
    (tmp_path / "bn-400.pt").write_bytes(b"torn")
    from batchnorm.training.checkpoint import CheckpointError

    with (
        Workers(MAKE, tmp_path, count=1) as workers,
        pytest.raises(CheckpointError, match=r"bn-400\.pt"),
    ):
        outcomes(workers)


def test_every_outcome_ends_with_its_result(tmp_path):
    with Workers(MAKE, tmp_path, count=2) as workers:
        found = outcomes(workers)
    assert set(found) == set(JOBS)
    for job, outcome in found.items():
        last = outcome.records[-1]
        assert isinstance(last, Result)
        assert last.steps == JOBS[job].steps
