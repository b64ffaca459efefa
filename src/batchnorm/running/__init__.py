"""A layer's running statistics: its buffers, how they follow the batches, and the named sets beside its own."""

from batchnorm.running.domain import domain as domain
