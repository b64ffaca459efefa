"""Training: one loop, checkpoints, and many runs side by side.

saved = batchnorm.training.load("runs/NAME")      # a trained network, the names of its classes, its transform
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchnorm.training.evaluation import SavedNetwork as SavedNetwork
    from batchnorm.training.evaluation import load as load

__all__ = ["SavedNetwork", "load"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from batchnorm.training import evaluation  # imports the data sets, which a configuration does not need

    return getattr(evaluation, name)
