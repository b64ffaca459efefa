"""The networks of the experiments."""

from batchnorm.models.inception import BNInception as BNInception
from batchnorm.models.mlp import MLP as MLP
