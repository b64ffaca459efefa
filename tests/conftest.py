import signal

import hypothesis
import pytest
import torch

from tests.command import in_this_process
from tests.forked import quick_starts

# A shell's background jobs ignore Ctrl-C, and so would every process that the tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)

# One thread: the tensors are small, two suites may share the cores, and sums come out the same every time.
torch.set_num_threads(1)

# The same examples every time: a red suite must be red again when it is looked into.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def forking():
    """What the library spawns in this test starts in no time."""
    with quick_starts():
        yield


@pytest.fixture
def here():
    """The command line in this process."""
    return in_this_process


def pytest_collection_modifyitems(config, items):
    """Slow tests first where workers share the suite, so that they end together."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_configure(config):
    """What one fixture makes in minutes is made once: a pytest whose groups xdist 3.8 does not see is refused."""
    if getattr(config.option, "dist", "no") == "loadgroup" and pytest.version_tuple >= (9, 2):
        raise pytest.UsageError(
            f"pytest-xdist does not see groups of tests under pytest {pytest.__version__}: pip install 'pytest<9.2'"
        )
