"""
Batch normalization on (outer, channels, inner) views; see native/kernels.h.
"""

from typing_extensions import CapsuleType


def forward(sizes: tuple[int, int, int], number: int, x: tuple[int, int, int], residual: tuple[int, int, int], y: tuple[int, int, int], weight: tuple[int, int], bias: tuple[int, int], eps: float, activation: int, slope: float, mean: tuple[int, int], m2: tuple[int, int], known: int, group: int, tracked: tuple[tuple[int, int], tuple[int, int], float, int], threads: int) -> bool:
    """
    The moments of x, unless they are known, 1: a mean and a variance, 2: what an earlier call found of x; and y = activation(bn(x) + residual), unless y is null; by groups of so many outer rows, unless it is 0. Then, without groups, `track` by these moments.
    """

def backward(sizes: tuple[int, int, int], number: int, dy: tuple[int, int, int], x: tuple[int, int, int], y: tuple[int, int, int], weight: tuple[int, int], bias: tuple[int, int], eps: float, activation: int, slope: float, mean: tuple[int, int], m2: tuple[int, int], given: bool, dx: tuple[int, int, int], dresidual: tuple[int, int, int], dweight: tuple[int, int], dbias: tuple[int, int], averages: tuple[int, int], group: int, threads: int) -> None:
    """
    The gradients of `forward`; y is read where a residual was added before an activation. With averages of g and of g·x̂, those of x and residual alone, and mean and m2 are a mean and a variance.
    """

def track_unbiased(channels: int, count: float, mean: tuple[int, int], variance: tuple[int, int], tracked: tuple[tuple[int, int], tuple[int, int], float, int]) -> bool:
    """`track` by a mean and an unbiased variance, both float32 or float64."""

def track(channels: int, count: float, mean: int, m2: int, tracked: tuple[tuple[int, int], tuple[int, int], float, int]) -> bool:
    """
    Update the running statistics and count the batch; False, and nothing done, when the moments are not all finite.
    """

def merge(parts: int, channels: int, counts: int, count_step: int, means: int, m2s: int, step: int, mean: int, m2: int) -> float:
    """Merge the moments of parts, all float64; return the count of all."""

def use_exchange(table: CapsuleType) -> bool:
    """
    Read tensors by DLPack's C exchange API, version 1.3 or later of major version 1; False where `table` is another.
    """

def forward_dense(x: object, y: object, weight: object | None, bias: object | None, stats: object, running_mean: object | None, running_var: object | None, batches: object | None, rate: float, eps: float, activation: int, slope: float, threads: int) -> tuple[int, bool] | None:
    """
    `forward` and `track` of tensors that are contiguous or channels-last, by the moments of x, which go to stats, (2, C); the count, and whether they entered the running statistics. None, and nothing done, where these are no such tensors.
    """

def backward_dense(dy: object, x: object, weight: object | None, bias: object | None, stats: object, dx: object, dweight: object | None, dbias: object | None, eps: float, activation: int, slope: float, threads: int) -> bool:
    """
    `backward` of what forward_dense did; False, and nothing done, where these are no such tensors.
    """

def instruction_set() -> str:
    """That of the kernels in use: avx512, avx2 or baseline."""

def use_instruction_set(name: str) -> None:
    """
    For tests: use the kernels of another one. ValueError where it cannot run.
    """
