"""Fold the networks of torchvision and timm, count what is left, and write docs/folding.md.

python docs/folding.py measure NAME ...    fold these networks, and add their rows to docs/measured/folding.jsonl
python docs/folding.py measure             all that have none yet; an hour and a half on two cores
python docs/folding.py                     write the page
"""

import copy
import json
import platform
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import batchnorm as bn
from batchnorm.graph.modules import has_statistics, is_normalization, normalizes
from batchnorm.graph.observation import BATCH_NORM, observe
from batchnorm.passes.fold.proof import as_dtype, difference, outputs

DOCS = Path(__file__).parent
ROWS = DOCS / "measured" / "folding.jsonl"
LARGEST = 60e6  # parameters, of timm's
NUMBER = 170  # of timm's families, those of the smallest networks
DETECTION = ("rcnn", "retinanet", "fcos", "ssd")
VIDEO = ("r3d", "mc3", "r2plus1d", "s3d")
PAIRS = ("raft",)  # which take two images
TOO_LARGE = ("regnet_y_128gf",)  # 644 million parameters, which in float64 twice do not fit into 24 GB
# beside which torchao and ONNX Runtime's optimizer are tried too
COMPARED = (
    "resnet18", "mobilenet_v2", "googlenet", "densenet121", "shufflenet_v2_x1_0", "timm/levit_128s", "timm/mixnet_s",
    "timm/repvgg_a0", "timm/mobileone_s0", "timm/repvit_m0_9", "timm/fastvit_t8", "timm/efficientnet_b0",
)  # fmt: skip

PAGE = """# Networks of torchvision and timm, folded

This page is written by `docs/folding.py` from rows that `python docs/folding.py measure` has written. Each network has
random weights and running statistics that are none of a new one (mean from N(0, 0.5), variance from U(0.5, 2), weight
from U(0.5, 1), bias from N(0, 0.3)), and is called with one image, of the smallest size of a few that it takes. A call
counts as folded if its layer is; as affine if a factor and a term of each channel are left of it. torch.fx is
`torch.fx.experimental.optimization.fuse`: how many calls of a batch norm operator are gone, and where its result is
wrong. {where}

| | networks | BN calls | folded | affine | left alone | torch.fx folded | torch.fx raises or is wrong |
|---|--:|--:|--:|--:|--:|--:|--:|
{totals}

Largest difference of an output, as a share of the largest: {float32} in float32, {float64} in float64 (where the
network computes in float64 throughout). Outputs that change as much when the weights are rounded are left out of that,
since a detector with random weights sorts scores that are equal ({jumping}): there each fold is proven alone.

## Beside other tools

BN calls that are left, of twelve networks. torchao: `torch.export` and the `_fuse_conv_bn_` of its PT2E flow. ONNX
Runtime: nodes left by its optimizer (extended level) in what `torch.onnx.export` writes, which itself folds some
(dynamo, `optimize=True`) or none (`optimize=False`).

| network | BN calls | `bn.fold`: not folded | torch.fx | torchao | ONNX Runtime | ONNX Runtime, unoptimized export |
|---|--:|--:|--:|--:|--:|--:|
{compared}

## What is not folded, and why

{why}

## Each network

Time is that of `bn.fold`, with its proof, on one thread; networks of detection are set to resize images to 160 pixels.

| network | input | BN calls | folded | affine | torch.fx | float32 | parameters | operations | s |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|
{rows}
"""


def build(name):
    """The network, with statistics and parameters of its layers that are none of a new one."""
    torch.manual_seed(0)
    if name.startswith("timm/"):
        import timm

        model = timm.create_model(name.removeprefix("timm/"), pretrained=False)
    else:
        from torchvision import models

        options = {}
        if any(kind in name for kind in (*DETECTION, "fcn_", "deeplab", "lraspp")):
            options["weights_backbone"] = None
        if any(kind in name for kind in ("rcnn", "retinanet", "fcos")):
            options |= {"min_size": 160, "max_size": 160}  # not 800: float64 is slow
        if "rcnn" in name:
            options["rpn_post_nms_top_n_test"] = 50  # proposals, not 1,000
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        model = models.get_model(name, weights=None, **options)
    for module in model.modules():
        if has_statistics(module):
            with torch.no_grad():
                nn.init.normal_(module.running_mean, 0, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 2)
                if module.weight is not None:
                    module.weight.copy_(torch.rand_like(module.weight) / 2 + 0.5)
                    module.bias.copy_(torch.randn_like(module.bias) * 0.3)
    return model.eval()


def example(name, model):
    """The smallest input of a few that it takes."""
    generator = torch.Generator().manual_seed(0)
    error = None
    for size in (64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384):
        shape = (1, 3, 16, size, size) if name.startswith(VIDEO) else (1, 3, size, size)
        images = torch.rand(shape, generator=generator)
        inputs = (list(images),) if any(kind in name for kind in DETECTION) else (images,)
        if name.startswith(PAIRS):
            inputs = (images, images.flip(3))
        try:
            outputs(copy.deepcopy(model), inputs, {})
        except Exception as why:
            error = why
            continue
        return inputs
    raise error


def calls(model, x):
    """By path, how often each normalization layer is called."""
    found = {}
    for call in observe(copy.deepcopy(model), *copy.deepcopy(x)).calls:
        if normalizes(call.module):
            found[call.path] = found.get(call.path, 0) + 1
    return found


def operators(model, x):
    seen = observe(copy.deepcopy(model), *copy.deepcopy(x))
    return sum(each.name in BATCH_NORM for each in seen.operations)


def by_fx(model, x):
    """Calls of batch norm operators that torch.fx's fuse leaves, and the error of its result, or what it raises."""
    from torch.fx.experimental.optimization import fuse

    expected = outputs(copy.deepcopy(model), x, {})
    try:
        fused = fuse(copy.deepcopy(model))
        return {"left": operators(fused, x), "error": difference(outputs(fused, x, {}), expected)}
    except Exception as why:
        return {"raised": type(why).__name__}


def by_torchao(model, x):
    from torchao.quantization.pt2e.utils import _fuse_conv_bn_

    program = torch.export.export(model, x).module()
    _fuse_conv_bn_(program)
    return sum("batch_norm" in str(node.target) for node in program.graph.nodes)


def by_onnxruntime(model, x, optimize):
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(model, x, path, dynamo=True, optimize=optimize, verbose=False)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        options.log_severity_level = 3
        onnxruntime.InferenceSession(path, options)
        graph = onnx.load(f"{folder}/optimized.onnx", load_external_data=False).graph
        return sum(node.op_type == "BatchNormalization" for node in graph.node)


def measure(name):
    model = build(name)
    x = example(name, model)
    called = calls(model, x)
    started = time.perf_counter()
    _, report = bn.fold(model, *x)
    seconds = time.perf_counter() - started
    count = {
        outcome: sum(called.get(layer.name, 0) for layer in report.layers if layer.outcome == outcome)
        for outcome in ("folded", "affine", "left alone")
    }
    row = {
        "name": name,
        "input": list((x[0][0] if isinstance(x[0], list) else x[0]).shape),
        "calls": sum(called.values()),
        **count,
        "known": report.known,
        "float32": report.error,
        "noise": report.noise,
        "parameters": report.parameters,
        "operations": report.operations,
        "seconds": round(seconds, 1),
        "fx": by_fx(model, x) | {"operators": operators(model, x)},
        "why": {
            layer.name: layer.why
            for layer in report.layers
            if layer.outcome != "folded" and called.get(layer.name)
        },
    }
    wide, wide_x = copy.deepcopy(model).double(), as_dtype(x, torch.float64)
    try:
        found, expected = bn.fold(wide, *wide_x)[0], outputs(copy.deepcopy(wide), wide_x, {})
        row["float64"] = difference(outputs(found, wide_x, {}), expected)
    except Exception as why:  # the network does not compute in float64
        row["float64"] = type(why).__name__
    if name in COMPARED:
        row["compared"] = {
            "torchao": by_torchao(copy.deepcopy(model), x),
            "onnxruntime": by_onnxruntime(copy.deepcopy(model), x, True),
            "unoptimized": by_onnxruntime(copy.deepcopy(model), x, False),
        }
    return row


def names():
    """Networks with batch normalization: all of torchvision's, and the smallest of each of 170 families of timm's."""
    import timm
    from torchvision import models

    for name in models.list_models():
        if "quantized" not in name and name not in TOO_LARGE and _has_layers(lambda name=name: build(name)):
            yield name
    families = {}
    for name in timm.list_models():
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except Exception:  # that cannot be built without memory
            continue
        size = sum(each.numel() for each in model.parameters())
        if size < LARGEST and any(map(is_normalization, model.modules())):
            family = re.sub(r"\d.*", "", name)
            families[family] = min(families.get(family, (size, name)), (size, name))
    yield from (f"timm/{name}" for _, name in sorted(families.values())[:NUMBER])


def _has_layers(make):
    return any(is_normalization(module) for module in make().modules())


def rows():
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def total(title, some):
    calls_, folded, affine, left = (
        sum(row[key] for row in some) for key in ("calls", "folded", "affine", "left alone")
    )
    fx = sum(row["fx"]["operators"] - row["fx"].get("left", row["fx"]["operators"]) for row in some)
    all_operators = sum(row["fx"]["operators"] for row in some)
    raised = sum("raised" in row["fx"] for row in some)
    wrong = sum(row["fx"].get("error", 0) > 1e-3 for row in some)
    return (
        f"| {title} | {len(some)} | {calls_:,} | {folded:,} ({folded / calls_:.1%}) | {affine:,} | {left:,} "
        f"| {fx:,} ({fx / all_operators:.1%}) | {raised} and {wrong} |"
    )


def page():
    found = {row["name"]: row for row in rows()}
    every = [*found.values()]
    torchvision_s = [row for row in every if not row["name"].startswith("timm/")]
    timm_s = [row for row in every if row["name"].startswith("timm/")]
    reasons = {}
    for row in every:
        for why in row["why"].values():
            kind = re.sub(r"\S+ pads its output", "a convolution pads its output", why)
            reasons.setdefault(kind, []).append(row["name"])
    common = sorted(reasons.items(), key=lambda each: -len(each[1]))
    compared = [row for row in every if "compared" in row]
    return PAGE.format(
        where=every[0]["machine"],
        totals="\n".join([total("torchvision", torchvision_s), total("timm", timm_s)]),
        float32=f"{max(row['float32'] for row in every if not _jumps(row)):.1e}",
        jumping=", ".join(row["name"] for row in every if _jumps(row)) or "none",
        float64=f"{max(row['float64'] for row in every if isinstance(row['float64'], float) and not _jumps(row)):.1e}",
        compared="\n".join(
            f"| {row['name']} | {row['calls']} | {row['calls'] - row['folded']} | {_fx(row)} "
            f"| {row['compared']['torchao']} | {row['compared']['onnxruntime']} | {row['compared']['unoptimized']} |"
            for row in compared
        ),
        why="| calls | networks | why |\n|--:|--:|---|\n"
        + "\n".join(f"| {len(of)} | {len(set(of))} | {why} |" for why, of in common[:25]),
        rows="\n".join(
            f"| {row['name']} | {'×'.join(map(str, row['input']))} | {row['calls']} | {row['folded']} "
            f"| {row['affine']} | {_fx(row)} | {row['float32']:.0e} "
            f"| {row['parameters'][0]:,} → {row['parameters'][1]:,} "
            f"| {row['operations'][0]} → {row['operations'][1]} | {row['seconds']} |"
            for row in every
        ),
    )


def _jumps(row):
    return row.get("noise", 0.0) > 1e-4


def _fx(row):
    fx = row["fx"]
    return fx.get("raised") or f"{fx['left']}" + (" (wrong)" if fx["error"] > 1e-3 else "")


def main(arguments):
    if arguments[:1] != ["measure"]:
        (DOCS / "folding.md").write_text(page())
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__.partition('+')[0]}."
    known = {row["name"] for row in rows()}
    for name in arguments[1:] or names():
        if name in known and not arguments[1:]:
            continue
        try:
            row = measure(name) | {"machine": machine}
        except Exception as why:
            print(f"{name}: {type(why).__name__}: {why}", file=sys.stderr, flush=True)
            continue
        others = [each for each in rows() if each["name"] != name]
        ROWS.write_text("".join(json.dumps(each) + "\n" for each in [*others, row]))
        print(f"{name}: {row['folded']} of {row['calls']} folded, {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
