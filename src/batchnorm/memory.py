"""Memory that stays: what a freed tensor held is kept for the next one, instead of given back to the system.

glibc maps every block above 32 MB on its own and unmaps it when it is freed, so each large output of a layer is paid
in page faults, at 6 to 7 times the cost of writing it. A training step asks for the same blocks as the step before:
after `keep_memory` it finds them, and after a few steps no page is faulted in any more.

The cost: what a process once held it keeps, so it stays at its peak until `return_memory`. The setting is the
process's, not the library's, which is why it is never made on import. It does not reach blocks above 64 MB that another
thread than the main one asks for.
"""

from __future__ import annotations

import ctypes
import sys

# of glibc's <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4

_MB = 2**20


def keep_memory() -> bool:
    """Keep freed memory in this process; return whether that took effect.

    It does where glibc's malloc serves the process: not on macOS, Windows or musl, nor when jemalloc, tcmalloc or
    another library stands in for it. The process stays at its peak until `return_memory`.

    Returns: whether the setting took effect.

    Example:
        >>> import batchnorm as bn
        >>> kept = bn.keep_memory()  # once, before a training
        >>> given_back = bn.return_memory()  # after it
        >>> kept == given_back
        True
    """
    # a higher mmap threshold would say the same, but older versions of glibc refuse one above 32 MB
    return _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1})


def return_memory() -> bool:
    """Give freed memory back to the system, now and from now on; return whether that took effect.

    The thresholds become those that glibc arrives at by itself in a process with large tensors, 32 MB for a mapping of
    its own and 64 MB for a trim. They may have been other ones, from environment variables say: glibc does not tell.

    Returns: whether the setting took effect, which it does where `keep_memory` does.

    Example:
        >>> import batchnorm as bn
        >>> bn.return_memory() == bn.keep_memory() == bn.return_memory()
        True
    """
    done = _set({_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 * _MB, _TRIM_THRESHOLD: 64 * _MB})
    if done:
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
    return done


def _set(options: dict[int, int]) -> bool:
    if not _malloc_is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(option, value) == 1 for option, value in options.items()])


class _Place(ctypes.Structure):
    """Dl_info of <dlfcn.h>: in which file, and where, an address lies."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def _malloc_is_glibc() -> bool:
    """Whether `malloc` lies in the same library as a function that only glibc has.

    A malloc that stands in for it may offer a mallopt too, one that does nothing.
    """
    if sys.platform != "linux":
        return False
    try:
        process = ctypes.CDLL(None)
        return _base(process, "malloc") == _base(process, "gnu_get_libc_version")
    except (AttributeError, OSError):  # musl
        return False


def _base(process: ctypes.CDLL, name: str) -> int | None:
    place = _Place()
    process.dladdr(ctypes.cast(getattr(process, name), ctypes.c_void_p), ctypes.byref(place))
    base: int | None = place.base
    return base
