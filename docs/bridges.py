"""Ask other libraries' own layers what they compute, and write the table of docs/bridges.md from their answers.

python docs/bridges.py record LIBRARY [PYTHON]    by an interpreter that has it: tests/interop/recorded/LIBRARY.json
python docs/bridges.py                            print the table
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

import batchnorm as bn
from batchnorm import bridges

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "tests" / "interop" / "recorded"
PROGRAM = ROOT / "tests" / "interop" / "libraries.py"
SETTINGS = {
    "keras": {"momentum": 0.8, "epsilon": 2e-3},
    "flax": {"momentum": 0.8, "epsilon": 2e-3},
    "tf-slim": {"decay": 0.8, "epsilon": 2e-3, "scale": True},
    "mxnet": {"momentum": 0.8, "eps": 2e-3, "fix_gamma": True},
    "caffe": {"eps": 2e-3, "moving_average_fraction": 0.8},
    "inplace_abn": {"momentum": 0.2, "eps": 2e-3, "activation": "leaky_relu", "activation_param": 0.2},
}


def numbers(seed):
    """An input, and a weight, bias, mean and variance, of numbers that float32 has."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return 3 * normal(3, 5, 4, 4) + 1, normal(5), normal(5), normal(5), normal(5).square() + 0.1


def foreign(library):
    """Values as that library has them, none of which came from here."""
    _, weight, bias, mean, variance = numbers(1)
    if library == "caffe":
        return {"BatchNorm": [mean * 7, variance * 7, torch.tensor([7.0])], "Scale": [weight, bias]}
    if library == "flax":
        return {"params": {"scale": weight, "bias": bias}, "batch_stats": {"mean": mean, "var": variance}}
    names = bridges.LIBRARIES[library].names
    parts = {"weight": weight, "bias": bias, "mean": mean, "variance": variance}
    return {names[part][0]: value for part, value in parts.items()}


def own(library):
    """A layer of ours, to be written."""
    _, weight, bias, mean, variance = numbers(2)
    layer = bn.BatchNorm2d(5, eps=3e-3, momentum=0.25)
    with torch.no_grad():
        for tensor, value in zip(
            (layer.weight, layer.bias, layer.running_mean, layer.running_var),
            (weight.abs() + 0.1 if library == "inplace_abn" else weight, bias, mean, variance),
            strict=True,
        ):
            tensor.copy_(value)
    layer.activation = "relu" if library == "inplace_abn" else None
    return layer.eval()


def lists(value):
    if isinstance(value, dict):
        return {key: lists(each) for key, each in value.items()}
    return [lists(each) for each in value] if isinstance(value, list) else value.tolist()


def record(library, python):
    cases = {}
    values, settings = bridges.write(library, own(library))
    for name, of in {"read": (foreign(library), SETTINGS[library]), "write": (values, settings)}.items():
        case = {"values": lists(of[0]), "settings": of[1], "x": numbers(3)[0].tolist()}
        asked = [python, str(PROGRAM), library]
        done = subprocess.run(asked, input=json.dumps(case), capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        cases[name] = {"case": case, "outcome": json.loads(done.stdout)}
    RECORDED.mkdir(exist_ok=True)
    (RECORDED / f"{library}.json").write_text(json.dumps(cases) + "\n")


def tensors(value):
    if isinstance(value, dict):
        return {key: tensors(each) for key, each in value.items()}
    if isinstance(value[0], list):
        return [torch.tensor(each) for each in value]
    return torch.tensor(value)


def errors(library):
    """The largest difference of an output, of reading and of writing; as a share of the largest output."""
    recorded = json.loads((RECORDED / f"{library}.json").read_text())
    found = []
    for name, each in recorded.items():
        case, outcome = each["case"], each["outcome"]
        x, expected = torch.tensor(case["x"]), torch.tensor(outcome["y"])
        settings = {key: value for key, value in case["settings"].items() if key != "scale"}
        layer = bridges.read(library, tensors(case["values"]), **settings) if name == "read" else own(library)
        with torch.no_grad():
            found.append(float((layer(x) - expected).abs().max() / expected.abs().max()))
    return recorded["read"]["outcome"]["version"], *found


def table():
    lines = ["| library | version | read: largest error | written: largest error |", "|---|---|--:|--:|"]
    for library in SETTINGS:
        version, read, written = errors(library)
        lines.append(f"| {library} | {version} | {read:.1e} | {written:.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["record"]:
        record(sys.argv[2], (sys.argv[3:] or [sys.executable])[0])
    else:
        print(table())
