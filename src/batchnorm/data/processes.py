"""An ordered map over requests, in worker processes or in this one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.util import Finalize
from threading import Thread
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from batchnorm.children import STOP_SIGNALS, exit_with_parent, signals_blocked
from batchnorm.data.idx import DataError

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Processes(Generic[Request, Answer]):
    """`answer(request)` for each of `requests`, in order; may be iterated repeatedly.

    count: number of worker processes, which work ahead. They start at the first iteration, live as long as
        this object and end with their parent. 0: the calls are made in this process when needed.

    With processes, `answer` and the requests must be picklable. Exceptions of `answer` are raised here, as
    torch's DataLoader does; DataError is also raised when a process was killed.
    """

    def __init__(
        self, answer: Callable[[Request], Answer], requests: Iterable[Request], count: int = 0
    ) -> None:
        self._answers = DataLoader(
            _Answers(answer),
            batch_size=None,
            sampler=requests,
            collate_fn=_identity,
            num_workers=count,
            multiprocessing_context="spawn" if count else None,  # torch does not survive a fork
            worker_init_fn=_initialize_worker,
            persistent_workers=count > 0,
            generator=torch.Generator(),  # so that the loader does not draw from the global one
        )

    def __iter__(self) -> Iterator[Answer]:
        with signals_blocked():  # a process inherits the mask, so Ctrl-C does not kill it during startup
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
                    del answer  # its traceback holds this frame, a cycle that would keep the processes alive
            yield answer


class _Answers(Dataset[Answer | DataError], Generic[Request, Answer]):
    def __init__(self, answer: Callable[[Request], Answer]) -> None:
        self._answer = answer

    def __getitem__(self, request: Request) -> Answer | DataError:
        try:
            return self._answer(request)
        except (
            DataError
        ) as error:  # if raised in a worker, the DataLoader would add a traceback to its message
            return error


def _identity(answer: Answer) -> Answer:
    return answer


def _initialize_worker(_: int) -> None:
    """Ignore the signals of the process group, and end when the parent ends or sends SIGTERM."""
    Finalize(None, _exit, exitpriority=-100)  # the last thing that multiprocessing does at a process's end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _exit() -> None:
    """End without finalising the interpreter, in which the thread that shares the last batches would be aborted.

    It is in torch's C++ code; asking for the GIL then ends it by an exception where there may be none (SIGABRT).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _exit_on_sigterm_of_parent() -> None:
    """Exit on a SIGTERM from the parent, which it sends to workers that do not end by themselves."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
