"""IDX files: what was written comes back; whatever is wrong with a file is said in one line that names it."""

import gzip

import numpy as np
import pytest
import torch

from batchnorm.data import idx
from batchnorm.data.idx import DataError


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


IMAGES = np.arange(2 * 3 * 4).reshape(2, 3, 4)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("array", [IMAGES, np.arange(7), np.zeros((0, 28, 28))])
def test_reads_what_was_written(tmp_path, pack, array):
    path = tmp_path / "file-without-an-ending"
    path.write_bytes(pack(idx_bytes(array)))
    tensor = idx.read(path)
    assert tensor.dtype == torch.uint8
    np.testing.assert_array_equal(tensor.numpy(), array)


def test_agrees_with_torchvision(tmp_path):
    mnist = pytest.importorskip("torchvision.datasets.mnist", reason="torchvision is an extra")
    path = tmp_path / "images"
    path.write_bytes(idx_bytes(IMAGES))
    assert torch.equal(idx.read(path), mnist.read_image_file(str(path)))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("length", range(len(idx_bytes(IMAGES))))
def test_a_file_torn_anywhere_is_an_error(tmp_path, pack, length):
    path = tmp_path / "torn"
    path.write_bytes(pack(idx_bytes(IMAGES)[:length]))
    with pytest.raises(DataError, match=r"torn|not an IDX file"):
        idx.read(path)


def test_a_gzip_stream_torn_anywhere_is_an_error(tmp_path):
    path, whole = tmp_path / "torn.gz", gzip.compress(idx_bytes(IMAGES))
    for length in range(2, len(whole)):  # from a shorter one nobody can tell that it was gzip
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="torn"):
            idx.read(path)


def test_a_flipped_bit_in_a_gzip_stream_is_an_error(tmp_path):
    path, whole = tmp_path / "flipped.gz", bytearray(gzip.compress(idx_bytes(IMAGES)))
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"flipped\.gz"):
        idx.read(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "missing"),
        (b"PNG", "not an IDX file"),
        (b"\x00\x00\x0d\x03" + bytes(12), "not an IDX file"),  # floats
        (b"\x00\x00\x08\x00", "not an IDX file"),  # no dimensions
        (b"\x01\x00\x08\x03" + idx_bytes(IMAGES)[4:], "not an IDX file"),
        (idx_bytes(IMAGES) + b"x", "not what its header says"),
    ],
)
def test_what_is_not_idx_is_an_error(tmp_path, content, says):
    path = tmp_path / "strange"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        idx.read(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match="cannot read"):
            idx.read(path)
