"""Which kernels compute: the native ones, torch's own, or the reference."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from types import TracebackType
from typing import Literal, cast, get_args

Name = Literal["native", "torch", "reference", "triton"]
NAMES: tuple[Name, ...] = ("native", "torch", "reference")  # those for a CPU
_VARIABLE = "BATCHNORM_KERNELS"

_chosen: Name | None = None


class use:  # called as a function, and used as a context manager
    """Compute with the kernels called `name`, from now on or inside a `with` block; process-wide.

    The environment variable BATCHNORM_KERNELS sets what a process starts with; without it that is native.

    Args:
        name: one of
            "native": this library's C++ kernels, for tensors on a CPU; those elsewhere are left to torch's kernels.
            "triton": the same for a CPU, and this library's Triton kernels for a CUDA GPU. They are tested by Triton's
                interpreter, and compiled, but have not run on a GPU yet, so they are no default.
            "torch": torch's own kernels, as accurate and as fast as `torch.nn.BatchNorm2d`.
            "reference": plain torch operations that can be read beside the paper; slow.

    Raises:
        ValueError: another name.
        RuntimeError: "native" or "triton" where the package was installed without native kernels, or there is no
            Triton.

    Example:
        >>> import batchnorm as bn
        >>> with bn.kernels.use("reference"):
        ...     bn.kernels.active()
        'reference'
    """

    def __init__(self, name: Name) -> None:
        global _chosen
        _check(name)
        if name in ("native", "triton") and not built():
            raise RuntimeError(f"there are no native kernels here: {_REMEDY}")
        if name == "triton" and not find_spec("triton"):
            raise RuntimeError("there is no Triton here, which comes with torch's builds for CUDA on Linux")
        self._before = _chosen
        _chosen = name

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._before


def active() -> Name:
    """The name of the kernels that compute; see `use`.

    Where the package was installed without its native kernels, the first call warns and takes torch's.

    Returns: "native", "triton", "torch" or "reference".

    Raises:
        ValueError: the environment variable BATCHNORM_KERNELS is none of these.

    Example:
        >>> import batchnorm as bn
        >>> with bn.kernels.use("torch"):
        ...     bn.kernels.active()
        'torch'
    """
    return _chosen or _first()


def on_cpu() -> Name:
    """The name of the kernels that compute for tensors on a CPU."""
    name = active()
    return "native" if name == "triton" else name


def instruction_set() -> str:
    """The instructions of the CPU for which the kernels in use were compiled.

    Returns: "avx512", "avx2", "baseline", or "" where the kernels are not native.

    Example:
        >>> import batchnorm as bn
        >>> with bn.kernels.use("torch"):
        ...     bn.kernels.instruction_set()
        ''
    """
    if on_cpu() != "native":
        return ""
    from batchnorm.kernels import _native

    return _native.instruction_set()


def built() -> bool:
    """Whether the package was installed with its native kernels."""
    try:
        from batchnorm.kernels import _native  # noqa: F401
    except ImportError:
        return False
    return True


_REMEDY = (
    "install a C++17 compiler (on Debian: apt install g++) and install the package again; "
    f"until then {_VARIABLE}=torch silences this"
)


def _first() -> Name:
    global _chosen
    name = os.environ.get(_VARIABLE) or "native"
    _check(name, f"{_VARIABLE}: ")
    if name == "triton":
        use("triton")  # or the error that it raises
    if name == "native" and not built():
        warnings.warn(
            "batchnorm was installed without its native kernels and computes with torch's, which are slower on "
            f"a CPU and lose digits where the mean is large: {_REMEDY}",
            RuntimeWarning,
            stacklevel=2,
        )
        name = "torch"
    _chosen = cast(Name, name)
    return _chosen


def _check(name: str, where: str = "") -> None:
    if name not in get_args(Name):
        raise ValueError(f"{where}unknown kernels {name!r}: use one of {', '.join(get_args(Name))}")
