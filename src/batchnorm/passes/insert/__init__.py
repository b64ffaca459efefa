"""Batch normalization into a model that has none."""

from batchnorm.passes.insert.inserted import insert as insert

__all__ = ["insert"]
