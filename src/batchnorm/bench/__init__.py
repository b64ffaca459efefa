"""Benchmarks: candidates measured in turns on the same data, and the results as tables and a figure.

kernels   BN with what follows it, forward and backward   options -> cases -> rounds -> rows -> tables, figure, page
step      whole training steps of known networks
infer     both in evaluation
"""
