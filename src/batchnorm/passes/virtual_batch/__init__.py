"""Micro-batches that are one batch: passes in lockstep, layers that meet the parts of one batch together."""

from batchnorm.passes.virtual_batch.micro_batches import virtual_batch as virtual_batch
