"""Section 4.1: the MNIST experiment."""
