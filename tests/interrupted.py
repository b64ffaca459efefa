"""An experiment that somebody stops."""

import os
import signal
import subprocess
from collections.abc import Mapping


def stopped_by_ctrl_c(*command: object, env: Mapping[str, str] | None = None) -> tuple[str, str]:
    """What an experiment says after Ctrl-C, which comes when its first network has ended and others are in training.

    Output and errors; its exit status is the one for that.
    """
    process = subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if " steps " in line:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
            break
    rest, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    return rest, errors
