"""Batches through a model whose layers observe them: the loop, and the statistics that are collected by it."""
