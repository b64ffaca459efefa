"""The arithmetic: native kernels, torch's and a reference; what autograd sees of them; the choice among them."""

from batchnorm.kernels.choice import active as active
from batchnorm.kernels.choice import instruction_set as instruction_set
from batchnorm.kernels.choice import use as use
