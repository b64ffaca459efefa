"""The processes of the tests themselves."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

from tests.forked import Forked


def test_threads_that_kill_their_own_processes_are_told_so(tmp_path):
    def killed(number):
        process = Forked(time.sleep, 100, out=tmp_path / str(number))
        time.sleep(0.002 * (number % 5))
        process.kill()
        return process.join()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(killed, range(200))) == {-signal.SIGKILL}
