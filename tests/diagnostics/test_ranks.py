"""Several processes: buffers that differ, and processes that do not examine their model."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

import batchnorm as bn
from batchnorm.diagnostics import rank_digests as module
from tests.diagnostics.networks import Own, batches


def of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model: Any = Own()
    bn.population(model, batches())
    assert not bn.examine(model, select=["BN5"]) and not bn.examine(model, select=["BN5"]).skipped.get(
        "BN501"
    )
    if rank:
        model.norms[1].running_mean += 1e-3
    found = bn.examine(model, select=["BN501"])
    assert [(each.code, each.layer, each.evidence) for each in found] == [("BN501", "norms.1", {"ranks": 2})]
    bn.reduce_statistics(model)
    assert not bn.examine(model, select=["BN501"])

    module._SECONDS = 0.5
    if rank == 0:  # alone: nobody waits for ever
        begun = time.monotonic()
        found = bn.examine(model, select=["BN501"])
        assert "process 1 did not examine its model within 0.5 s" in found.skipped["BN501"]
        assert time.monotonic() - begun < 5
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_with_other_buffers(tmp_path):
    spawn(of_two, (tmp_path,), 2)


def test_one_process_has_nobody_to_compare_with():
    assert "several processes" in bn.examine(Own(), select=["BN501"]).skipped["BN501"]
