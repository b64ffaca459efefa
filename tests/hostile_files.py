"""Files that were made to hurt: what comes of reading each, in how much memory and time.

python -m tests.hostile_files     the table of docs/training.md
"""

import gzip
import io
import json
import os
import resource
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from batchnorm.data import idx, shards
from batchnorm.data.idx import DataError
from batchnorm.training import checkpoint, toml
from batchnorm.training.checkpoint import CheckpointError
from batchnorm.training.toml import ConfigError
from tests.forked import CONTEXT

MB = 2**20
PATIENCE = 20  # seconds until a reader is said to hang
START = 120  # seconds for the process to begin


class Outcome(NamedTuple):
    error: str  # its class and message; or what was returned, or another error
    megabytes: float  # beyond what the process had
    seconds: float


class Case(NamedTuple):
    make: Callable[[Path], object]  # writes the file, or what else is there
    read: Callable[[Path], object]


def zeros(path: Path, megabytes: int, start: bytes = b"") -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(start)
        for _ in range(megabytes // 16):
            file.write(bytes(16 * MB))


def sizes(*values: int) -> bytes:
    return b"".join([b"\0\0\x08", bytes([len(values)]), *(value.to_bytes(4, "big") for value in values)])


def tar(path: Path, **members: bytes | int) -> None:
    """A shard of one sample; a number is the size that a member of nothing claims."""
    with tarfile.open(path, "w") as archive:
        for ending, content in members.items():
            info = tarfile.TarInfo(f"000000.{ending}")
            info.size = content if isinstance(content, int) else len(content)
            archive.addfile(
                info, io.BytesIO(b"" if isinstance(content, int) else content) if info.size else None
            )


def claims(path: Path, size: int) -> None:
    """A member whose header says more than the file has."""
    tar(path, jpg=b"", cls=b"0")
    content = bytearray(path.read_bytes())
    info = tarfile.TarInfo("000000.jpg")
    info.size = size
    content[:512] = info.tobuf(tarfile.GNU_FORMAT)[:512]
    path.write_bytes(content)


def undecodable(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for ending in ("jpg", "cls"):
            info = tarfile.TarInfo(f"caf\xe9.{ending}")
            info.size = 1
            archive.addfile(info, io.BytesIO(b"0"))


def forged(path: Path, **lists: object) -> None:
    """An index that is up to date, and says that the image lies elsewhere."""
    tar(path, jpg=b"0", cls=b"0")
    shards.Index.of(path)
    stored = path.with_name(f"{path.name}.index")
    stored.write_text(json.dumps({**json.loads(stored.read_text()), **lists}))


def nested(path: Path) -> None:
    tar(path, jpg=b"0", cls=b"0")
    path.with_name(f"{path.name}.index").write_text("[" * 200_000)


def archive_bomb(path: Path, megabytes: int = 256) -> None:
    whole = io.BytesIO()
    torch.save({"weights": torch.zeros(8)}, whole)
    with (
        zipfile.ZipFile(whole) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target,
    ):
        for member in source.infolist():
            with target.open(member.filename, "w", force_zip64=True) as file:
                if not member.filename.endswith("data/0"):
                    file.write(source.read(member))
                for _ in range(megabytes // 16 if member.filename.endswith("data/0") else 0):
                    file.write(bytes(16 * MB))


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def folder_bit(path: Path) -> None:
    """Bit 0x10 of a member's external attributes, by which torch takes weights for a folder."""
    checkpoint.save({"weights": torch.ones(64)}, path)
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02", content.rindex(b"data/0") - 80)
    content[entry + 38] ^= 0x10
    path.write_bytes(content)


def settings(text: str) -> Case:
    return Case(lambda path: path.write_text(text), toml.read)


CASES: dict[str, Case] = {
    "IDX: gzip of 256 MB without a magic number": Case(lambda path: zeros(path, 256, b"no"), idx.read),
    "IDX: gzip of 256 MB for a header of 47 MB": Case(
        lambda path: zeros(path, 256, sizes(60_000, 28, 28)), idx.read
    ),
    "IDX: a header of 2¹²⁸ values": Case(lambda path: zeros(path, 16, sizes(*[2**32 - 1] * 4)), idx.read),
    "IDX: not zipped, a header of 2⁹⁶ values": Case(
        lambda path: path.write_bytes(sizes(*[2**32 - 1] * 3)), idx.read
    ),
    "IDX: a pipe": Case(os.mkfifo, idx.read),
    "IDX: /dev/zero": Case(lambda path: path.symlink_to("/dev/zero"), idx.read),
    "shard: a name that is not UTF-8": Case(undecodable, shards.Index.of),
    "shard: a class of 10²⁰": Case(lambda path: tar(path, jpg=b"0", cls=b"1" + b"0" * 20), shards.Index.of),
    "shard: a class of 10,000 digits": Case(
        lambda path: tar(path, jpg=b"0", cls=b"1" * 10_000), shards.Index.of
    ),
    "shard: a class file of 64 MB": Case(
        lambda path: tar(path, jpg=b"0", cls=bytes(64 * MB)), shards.Index.of
    ),
    "shard: a label nested 200,000 deep": Case(
        lambda path: tar(path, jpg=b"0", json=b"[" * 200_000), shards.Index.of
    ),
    "shard: a label of infinity": Case(
        lambda path: tar(path, jpg=b"0", json=b'{"label": 1e999}'), shards.Index.of
    ),
    "shard: an image that claims 4 TB": Case(lambda path: claims(path, 4 * 10**12), shards.Index.of),
    "checkpoint: an archive that unpacks to 256 MB": Case(archive_bomb, checkpoint.load),
    "checkpoint: the bit that makes weights a folder": Case(folder_bit, checkpoint.load),
    "checkpoint: a sparse file of 1 TB": Case(sparse, checkpoint.load),
    "checkpoint: a pipe": Case(os.mkfifo, checkpoint.load),
    "checkpoint: /dev/zero": Case(lambda path: path.symlink_to("/dev/zero"), checkpoint.load),
    "run.toml: 100,000 brackets": settings("[training]\nsteps = " + "[" * 100_000),
    "run.toml: an integer of 10,000 digits": settings("[training]\nsteps = " + "9" * 10_000),
    "run.toml: 10³⁰ steps": settings("[training]\nsteps = 1" + "0" * 30),
    "run.toml: 64 MB that are not UTF-8": Case(lambda path: path.write_bytes(b"\xff" * 64 * MB), toml.read),
}
# Indices beside a good shard: what is wrong in them is found, and the shard is scanned again.
INDICES: dict[str, Case] = {
    "index: an offset of 2⁷⁰": Case(lambda path: forged(path, offsets=[2**70]), shards.Index.of),
    "index: an offset of -5": Case(lambda path: forged(path, offsets=[-5]), shards.Index.of),
    "index: a size of 4 TB": Case(lambda path: forged(path, sizes=[4 * 10**12]), shards.Index.of),
    "index: a label of 10²⁰": Case(lambda path: forged(path, labels=[10**20]), shards.Index.of),
    "index: lists of unequal lengths": Case(lambda path: forged(path, labels=[0, 1]), shards.Index.of),
    "index: nested 200,000 deep": Case(nested, shards.Index.of),
}


def outcome(name: str, path: Path) -> Outcome:
    """Of reading what the case of that name makes, in a process that has done nothing else.

    A fork of this process would count, beside what is read, whatever it touches of what is here already.
    """
    case = (CASES | INDICES)[name]
    case.make(path)
    here, there = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=_read, args=(there, name, path))
    child.start()
    there.close()
    try:
        if here.poll(START) and here.recv() == "ready" and here.poll(PATIENCE):
            return Outcome(*here.recv())
    except EOFError:
        pass
    finally:
        child.kill()
        child.join()
        here.close()
    return Outcome("not caught: it died or hung", 0, 0)


def _read(pipe: Connection, name: str, path: Path) -> None:
    case = (CASES | INDICES)[name]
    pipe.send("ready")
    before, started = peak(), time.monotonic()
    try:
        said = f"returned {case.read(path)}"
    except (DataError, CheckpointError, ConfigError) as error:
        said = f"{type(error).__name__}: {error}"
    except BaseException as error:
        said = f"not caught: {type(error).__name__}: {error}"[:500]
    pipe.send(Outcome(said, (peak() - before) / 1024, time.monotonic() - started))


def peak() -> int:
    """kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Print the table."""
    print("| file | outcome | MB | seconds |\n| :-- | :-- | --: | --: |")
    for name in CASES | INDICES:
        with tempfile.TemporaryDirectory() as folder:
            found = outcome(name, Path(folder) / "file")
            said = found.error.replace(f"{folder}/", "").replace("|", " ")
            said = "the index is made anew" if name in INDICES and said.startswith("returned") else said
            print(f"| {name} | {said[:140]} | {found.megabytes:.0f} | {found.seconds:.2f} |")


if __name__ == "__main__":
    main()
