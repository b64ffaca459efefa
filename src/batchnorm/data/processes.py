"""Requests answered in order, by processes of their own or by this one itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from threading import Thread
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from batchnorm.children import STOP_SIGNALS, leave_with_parent, signals_blocked
from batchnorm.data.idx import DataError

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Processes(Generic[Request, Answer]):
    """`answer(request)` for each of `requests`, in their order; may be iterated again and again.

    count: processes that do it ahead of time; they start at the first iteration, live as long as this object
        is in use, and die with their parent. 0: the calls happen here, when an answer is asked for.

    With processes, `answer` and the requests must be picklable. A DataError from `answer` is raised here;
    whatever else it raises too, as torch's DataLoader does. Raises: DataError too when a process was killed.
    """

    def __init__(
        self, answer: Callable[[Request], Answer], requests: Iterable[Request], count: int = 0
    ) -> None:
        self._answers = DataLoader(
            _Answers(answer),
            batch_size=None,
            sampler=requests,
            collate_fn=_unchanged,
            num_workers=count,
            multiprocessing_context="spawn" if count else None,  # torch does not survive a fork
            worker_init_fn=_start,
            persistent_workers=count > 0,
            generator=torch.Generator(),  # the global one is not for us to draw from
        )

    def __iter__(self) -> Iterator[Answer]:
        with signals_blocked():  # a process inherits the mask: none dies of Ctrl-C while it is starting
            answers = iter(self._answers)
        while True:
            try:
                answer = next(answers)
            except StopIteration:
                return
            except RuntimeError as error:
                if "exited unexpectedly" not in str(error) and "is killed by" not in str(error):
                    raise
                raise DataError(
                    "a loader process was killed: out of memory, or of shared memory, of which a container has "
                    "little (docker run --shm-size=8g)"
                ) from None
            if isinstance(answer, DataError):
                try:
                    raise answer
                finally:
                    del answer  # by its traceback it would hold itself, and with that the processes
            yield answer


class _Answers(Dataset[Answer | DataError], Generic[Request, Answer]):
    def __init__(self, answer: Callable[[Request], Answer]) -> None:
        self._answer = answer

    def __getitem__(self, request: Request) -> Answer | DataError:
        try:
            return self._answer(request)
        except DataError as error:  # raised in a process, it would come back with the text of a traceback
            return error


def _unchanged(answer: Answer) -> Answer:
    return answer


def _start(_: int) -> None:
    """Stop when the parent says so, and not by a signal that it gets too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_with_parent()
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        Thread(target=_leave_when_told, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _leave_when_told() -> None:
    """On the parent's own SIGTERM, which it sends to processes that are in the way of its end."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
