"""Labelled images: data sets, shuffling, cropping and distortion, batches."""
