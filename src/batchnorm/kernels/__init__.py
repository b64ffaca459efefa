"""The arithmetic: native kernels, torch's and a reference; what autograd sees of them; the choice among them.

Public are `use`, which chooses, and `active` and `instruction_set`, which tell.

Example:
    >>> import batchnorm as bn
    >>> bn.kernels.active() in ("native", "triton", "torch", "reference")
    True
"""

from batchnorm.kernels.choice import active as active
from batchnorm.kernels.choice import instruction_set as instruction_set
from batchnorm.kernels.choice import use as use
