"""The arithmetic: reference kernels in plain torch, and the op that autograd sees."""
