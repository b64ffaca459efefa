"""How fast, and against whom: contenders that take turns on the same data, and what came out as tables and a picture.

kernels   BN with what follows it, forward and backward   options -> cases -> rounds -> rows -> tables, figure, page
step      whole training steps of known networks
infer     both in evaluation
"""
