"""Labelled images: from files, folders and tars, in which order, cut how, in batches."""
