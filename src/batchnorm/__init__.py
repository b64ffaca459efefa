"""Batch Normalization for PyTorch, complete.

    Moments(count, mean, m2) is what a batch says;  Affine(scale, shift) is what a layer does.
    layer = normalise by the moments of x  ·  sync = merge moments over ranks  ·  ghost = one Moments per group
    population = merge moments over batches  ·  fold = compose an Affine into the neighbour
    Nearly every module of the library is one of these verbs.

The names below are all there is; docs/tour.md shows each at work.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from batchnorm import bridges as bridges
    from batchnorm import kernels as kernels
    from batchnorm.calibrate.adapt import adapt as adapt
    from batchnorm.calibrate.states import merge_states as merge_states
    from batchnorm.calibrate.states import reduce_statistics as reduce_statistics
    from batchnorm.calibrate.states import split_state as split_state
    from batchnorm.diagnostics.examine import examine as examine
    from batchnorm.diagnostics.shift_meter import ShiftMeter as ShiftMeter
    from batchnorm.diagnostics.watching import watch as watch
    from batchnorm.functional import batch_norm as batch_norm
    from batchnorm.layers import BatchNorm as BatchNorm
    from batchnorm.layers import BatchNorm1d as BatchNorm1d
    from batchnorm.layers import BatchNorm2d as BatchNorm2d
    from batchnorm.layers import BatchNorm3d as BatchNorm3d
    from batchnorm.lazy_layers import LazyBatchNorm1d as LazyBatchNorm1d
    from batchnorm.lazy_layers import LazyBatchNorm2d as LazyBatchNorm2d
    from batchnorm.lazy_layers import LazyBatchNorm3d as LazyBatchNorm3d
    from batchnorm.memory import keep_memory as keep_memory
    from batchnorm.memory import return_memory as return_memory
    from batchnorm.moments import Affine as Affine
    from batchnorm.moments import Moments as Moments
    from batchnorm.passes.average import average as average
    from batchnorm.passes.configure import configure as configure
    from batchnorm.passes.convert_sync import convert_sync as convert_sync
    from batchnorm.passes.downgrade import downgrade as downgrade
    from batchnorm.passes.estimate import population as population
    from batchnorm.passes.export import export as export
    from batchnorm.passes.fold import fold as fold
    from batchnorm.passes.freeze import freeze as freeze
    from batchnorm.passes.freeze import unfreeze as unfreeze
    from batchnorm.passes.insert import insert as insert
    from batchnorm.passes.mask import mask as mask
    from batchnorm.passes.param_groups import param_groups as param_groups
    from batchnorm.passes.paused import paused as paused
    from batchnorm.passes.save_memory import save_memory as save_memory
    from batchnorm.passes.strip_bias import strip_bias as strip_bias
    from batchnorm.passes.upgrade import upgrade as upgrade
    from batchnorm.passes.virtual_batch import virtual_batch as virtual_batch
    from batchnorm.passes.zero_init_residual import zero_init_residual as zero_init_residual
    from batchnorm.running.domain import domain as domain
    from batchnorm.statistics import Ghost as Ghost
    from batchnorm.statistics import Population as Population
    from batchnorm.statistics import Ramp as Ramp
    from batchnorm.statistics import Renorm as Renorm
    from batchnorm.statistics import Sync as Sync

# Names are imported when first used: `batchnorm --help` and `batchnorm report` must not wait for torch.
_HOME = {
    "bridges": "bridges",
    "kernels": "kernels",
    "Moments": "moments",
    "Affine": "moments",
    "batch_norm": "functional",
    "BatchNorm": "layers",
    "BatchNorm1d": "layers",
    "BatchNorm2d": "layers",
    "BatchNorm3d": "layers",
    "LazyBatchNorm1d": "lazy_layers",
    "LazyBatchNorm2d": "lazy_layers",
    "LazyBatchNorm3d": "lazy_layers",
    "Ghost": "statistics",
    "Population": "statistics",
    "Ramp": "statistics",
    "Renorm": "statistics",
    "Sync": "statistics",
    "domain": "running",
    "adapt": "calibrate.adapt",
    "average": "passes.average",
    "configure": "passes.configure",
    "convert_sync": "passes.convert_sync",
    "export": "passes.export",
    "fold": "passes.fold",
    "freeze": "passes.freeze",
    "unfreeze": "passes.freeze",
    "insert": "passes.insert",
    "mask": "passes.mask",
    "merge_states": "calibrate.states",
    "param_groups": "passes.param_groups",
    "population": "passes.estimate",
    "reduce_statistics": "calibrate.states",
    "split_state": "calibrate.states",
    "paused": "passes.paused",
    "upgrade": "passes.upgrade",
    "examine": "diagnostics.examine",
    "watch": "diagnostics.watching",
    "ShiftMeter": "diagnostics.shift_meter",
    "downgrade": "passes.downgrade",
    "save_memory": "passes.save_memory",
    "strip_bias": "passes.strip_bias",
    "virtual_batch": "passes.virtual_batch",
    "zero_init_residual": "passes.zero_init_residual",
    "keep_memory": "memory",
    "return_memory": "memory",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from batchnorm.requirements import old_torch

    if problem := old_torch():
        raise ImportError(problem)
    module = import_module(f"{__name__}.{_HOME[name]}")
    value = module if name == _HOME[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*_HOME, "__version__"]
