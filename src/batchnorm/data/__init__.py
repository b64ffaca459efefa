"""Data sets: MNIST-like digits from IDX files."""
