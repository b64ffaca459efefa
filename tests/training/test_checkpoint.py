"""Checkpoint files: whole, damaged, hostile, and none at all."""

import os
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch

from batchnorm.training import checkpoint
from batchnorm.training.checkpoint import CheckpointError
from tests.hostile_files import archive_bomb
from tests.mutations.mutation import Mutation

STATE = {"step": 3, "weights": torch.arange(5.0), "records": ["a"], "empty": torch.zeros(0, 2), "none": None}


def same(state):
    return (
        state.keys() == STATE.keys()
        and state["weights"].equal(STATE["weights"])
        and state["empty"].equal(STATE["empty"])
        and [state[name] for name in ("step", "records", "none")] == [3, ["a"], None]
    )


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "step-000000003.pt"
    checkpoint.save(STATE, path)
    return path


def test_torch_and_zip_tools_read_it_as_any_other(path):
    assert same(torch.load(path)) and same(checkpoint.load(path))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"sha256=")
    torch.save(STATE, path)  # one that somebody wrote by torch.save is read too
    assert same(checkpoint.load(path))


@pytest.mark.parametrize("written", ["by save", "by torch.save"])
def test_every_flipped_bit_is_an_error_or_of_no_consequence(written, path):
    if written == "by torch.save":  # whose checksums leave out a fifth of the file
        torch.save(STATE, path)
    content, read = bytearray(path.read_bytes()), 0
    for place in range(8 * len(content)):
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            assert same(checkpoint.load(path)), f"bit {place}"
            read += 1
        except CheckpointError:
            pass
        content[place // 8] ^= 1 << place % 8
    assert written == "by torch.save" or not read


def test_every_truncation_is_an_error(path):
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="is broken: delete it"):
            checkpoint.load(path)
    path.write_bytes(content + b"more")
    with pytest.raises(CheckpointError, match="is broken"):
        checkpoint.load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_and_not_waited_for(kind, tmp_path):
    path = tmp_path / "step-000000003.pt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(CheckpointError, match="is broken"):
        checkpoint.load(path)
    assert checkpoint.load(tmp_path / "none.pt") is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_an_archive_that_unpacks_to_more_than_it_holds_is_refused_in_little_memory(tmp_path):
    path = tmp_path / "step-000000003.pt"
    archive_bomb(path, megabytes=400)
    code = f"""
        import resource
        from pathlib import Path
        from batchnorm.training import checkpoint
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            checkpoint.load(Path({str(path)!r}))
        except checkpoint.CheckpointError:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) < 100_000  # kB


MUTATIONS = [
    Mutation(
        "the archive's checksums will do",
        "training/checkpoint.py",
        "signed = not content.endswith(bytes(2))",
        "signed = False",
        "a folder's bit makes weights of what memory holds",
        ("training/test_checkpoint.py",),
    ),
]
