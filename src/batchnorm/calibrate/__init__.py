"""Run batches through a model to collect statistics: domain adaptation and population statistics."""
