"""Micro-batches with the statistics and gradients of one batch: forward passes in lockstep, normalised jointly."""

from batchnorm.passes.virtual_batch.micro_batches import virtual_batch as virtual_batch
