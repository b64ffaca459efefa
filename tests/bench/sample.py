"""Results as a run leaves them, with numbers made up so that each can be recognised."""

from batchnorm.bench.link import COLLECTIVES, SMALL
from batchnorm.bench.options import Options
from batchnorm.bench.rounds import times
from batchnorm.bench.rows import Command, Measured, Processes, Row


def layer(shape, layout, dtype, ours, torch, copy, compile_static=None):
    """Rows of one layer, forward and backward: seconds of each candidate, the backward at twice the forward."""
    one = {who: {"forward": s, "backward": 2 * s} for who, s in (("ours", ours), ("torch", torch))}
    if compile_static:
        one["compile"] = {"forward": compile_static, "backward": 2 * compile_static}
    one["copy"] = {"copy": copy}
    return [
        Row(
            name="BN+ReLU", shape=shape, layout=layout, dtype=dtype, part=part, calls=5, rounds=7,
            times=times([one] * 7, part),
        )
        for part in ("forward", "backward", "both")
    ]  # fmt: skip


def network(name, layout, ours, **others):
    seconds = {"ours": ours, **{who.replace("_", " "): s for who, s in others.items()}}
    one = {who: {"step": s} for who, s in seconds.items()}
    return Row(
        name=name, shape=(32, 3, 64, 64), layout=layout, dtype="float32", part="step", calls=1, rounds=9,
        times=times([one] * 9, "step"),
    )  # fmt: skip


def mode(name, shape, ours, plain, **others):
    """As `layer`, of one with statistics."""
    seconds = {"ours": ours, "plain": plain, **{who.replace("_", " "): s for who, s in others.items()}}
    one = {who: {"forward": s, "backward": 2 * s} for who, s in seconds.items()}
    return [
        Row(
            name=name, shape=shape, layout="NCHW", dtype="float32", part=part, calls=5, rounds=7,
            times=times([one] * 7, part),
        )
        for part in ("forward", "backward", "both")
    ]  # fmt: skip


def virtual():
    one = {"ours": {"step": 0.4}, "one batch": {"step": 0.2}, "accumulation": {"step": 0.3}}
    return Row(
        name="virtual_batch", shape=(32, 3, 64, 64), layout="NCHW", dtype="float32", part="step", calls=1, rounds=9,
        times=times([one] * 9, "step"),
    )  # fmt: skip


def step_of_ranks(count, plain, ours, gather, reduce, cores=2):
    """Seconds of a step without Sync and with it, and of bare collectives of 8 bytes; those of 1 MiB take twice."""
    one = {"ours": {"step": ours}, "plain": {"step": plain}}
    one |= {
        who: {
            "step": {"all_gather": gather, "all_reduce": reduce}[each.name]
            * (1 if each.bytes == SMALL else 2)
        }
        for who, each in COLLECTIVES.items()
    }
    return Row(
        name=f"BNInception/4, {count} ranks", shape=(32, 1, 28, 28), layout="NCHW", dtype="float32", part="step",
        calls=1, rounds=9, processes=Processes(count=count, cores=cores), times=times([one] * 9, "step"),
    )  # fmt: skip


def measured(command: Command = "kernels", *, finished: bool = True, compile_static: bool = True) -> Measured:
    with_compile = 0.25 if compile_static else None
    rows = (
        [
            row
            for dtype in ("float32", "bfloat16")
            for layout in ("NCHW", "channels-last")
            for row in [
                *layer((32, 64, 112, 112), layout, dtype, 0.02, 0.16, 0.01, with_compile),
                *layer((32, 1024, 7, 7), layout, dtype, 0.001, 0.002, 0.0005),
            ]
        ]
        if command == "kernels"
        else [
            *mode("Ghost(16)", (32, 64, 56, 56), 0.01, 0.008, loop=0.03, timm=0.02),
            *mode("Ghost(16)", (32, 256, 14, 14), 0.004, 0.002, loop=0.016),
            *mode("Sync, 2 ranks", (60, 100), 0.0004, 0.0001),
            virtual(),
        ]
        if command == "statistics"
        else [step_of_ranks(1, 0.1, 0.1, 2e-5, 1e-5), step_of_ranks(4, 0.2, 0.5, 2e-3, 1e-3)]
        if command == "scaling"
        else [
            network("resnet18", "NCHW", 0.2, torch=0.25, compile=1.5, without_BN=0.18),
            network("mobilenet_v2", "NCHW", 0.1, torch=0.16, compile=1.5, without_BN=0.07),
            network("resnet18", "own settings", 0.15, torch=0.3),
        ]
    )
    return Measured(
        command=command,
        line=f"batchnorm bench {command}",
        options=Options(networks=("resnet18",) if command not in ("kernels", "scaling") else ()),
        threads=2,
        machine="a processor, 2 cores, Linux x86_64",
        versions={"python": "3.11.7", "batchnorm": "0.1.0", "torch": "2.14.1"},
        environment={"OMP_NUM_THREADS": "2"},
        kept_memory=True,
        started="2026-01-02T03:04:05+00:00",
        finished=finished,
        notes=["BN+ReLU 256×1024 (N, C) float32: torch.compile failed with InductorError"],
        rows=rows,
    )
