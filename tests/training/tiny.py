"""A training of few steps, and whether two states are the same."""

from typing import Any

import torch

TINY: dict[str, dict[str, Any]] = {
    "model": {"width": 0.05, "stem": "small", "dropout": 0.0},
    "data": {"image_size": 16, "distortion": "none"},
    "optimizer": {"rate": 0.05},
    "training": {"steps": 6, "batch_size": 8},
    "evaluation": {"every": 3, "images": 40, "population_batches": 2},
    "machine": {"device": "cpu", "threads": 1, "keep_memory": False},
}


def same(one: object, other: object) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(one.cpu().nan_to_num(), other.cpu().nan_to_num())
        )
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(one[k], other[k]) for k in one)
        )
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)
