"""Everything that the documentation shows is run: every Python block, every command; every link leads somewhere."""

import importlib
import re
import runpy
import shlex
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel

from batchnorm.data.digits import Digits
from batchnorm.experiments.mnist.digits_experiment import mnist_experiment
from batchnorm.experiments.mnist.digits_settings import DigitsSettings
from batchnorm.records import Run, Verdict, read
from batchnorm.training.config import Config, InceptionModel
from batchnorm.training.toml import literal

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# What a command is run with, so that it ends soon and leaves nothing behind.
QUICK = ["--steps", "20", "--seeds", "1", "--workers", "1"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[str]:
    lines = [
        line.split("#")[0].strip()
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.splitlines()
    ]
    return sorted({line for line in lines if line.split()[:1] == [program]})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_language_is_one_that_is_run(page):
    assert set(re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)) <= {"", "python", "bash"}
    known = {"batchnorm", "make", "pip"}
    for block in blocks(page, "bash"):
        assert {line.split()[0] for line in block.splitlines() if line.strip()} <= known


@pytest.mark.slow
def test_the_table_of_data_that_is_not_shuffled_repeats():
    shown = re.search(r"(\| training \| rate .*?\n)\n", (ROOT / "docs/statistics.md").read_text(), re.DOTALL)
    assert shown is not None
    rows = [line.split(" | ") for line in shown.group(1).splitlines()[2:]]
    script = runpy.run_path(str(ROOT / "docs/class_ordered.py"))
    digits = Digits.load()
    assert [row[0].removeprefix("| ") for row in rows] == list(script["WAYS"])
    for way, rate, mean, seeds in rows:
        found = script["accuracy"](
            digits, way.removeprefix("| "), float(rate), seed=7
        )  # not one of the table's
        low, high = map(float, seeds.removesuffix(" |").split("–"))
        assert low - 0.1 < found < high + 0.1 and low <= float(mean) <= high


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name
)
def test_python_blocks_run_in_order(page):
    code = "\n".join(blocks(page, "python"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


REPRODUCE = [command for command in commands("batchnorm") if " reproduce " in command]
# parsed alone: tests/experiments runs these, and the test after the next all claims
HEAVY = ("imagenet", "ensemble", "fashion-mnist", "list", "all")


@pytest.mark.parametrize(
    "command", [line for line in REPRODUCE if {*HEAVY} & {*line.split()} and "--claims all" not in line]
)
def test_reproduce_commands_are_understood(here, command, tmp_path):
    words = shlex.split(command)[1:]
    done = here(*words, *(["--help"] if "ensemble" in words else ["--claims", "list"]), cwd=tmp_path)
    assert done.code == 0, done.error


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in REPRODUCE if not {*HEAVY} & {*line.split()}])
def test_reproduce_commands_run(here, forking, command, tmp_path):
    done = here(*shlex.split(command)[1:], *QUICK, cwd=tmp_path)
    assert done.code == 0, done.error
    (run,) = (tmp_path / "runs").iterdir()
    assert here("report", run).code == 0


@pytest.mark.slow
def test_all_claims_run(here, forking, tmp_path):
    assert any("--claims all" in command for command in commands("batchnorm"))
    few = ("--steps", 1, "--seeds", 1, "--workers", 1)
    done = here("reproduce", "mnist", "--claims", "all", *few, cwd=tmp_path)
    assert done.code == 0, done.error


def test_train_and_evaluate_commands_are_understood(here, tmp_path):
    """All but what trains: each command of the documentation, on the run.toml that the first one prints."""
    lines = [line for line in commands("batchnorm") if line.split()[1] in ("train", "evaluate")]
    assert len(lines) >= 6
    example = here("train", "--example")
    assert example.code == 0
    (tmp_path / "run.toml").write_text(example.out)
    for line in lines:
        words = shlex.split(line.split(">")[0])[1:]
        if "--resume" in words or words[0] == "evaluate":
            done = here(*words, "--help", cwd=tmp_path)
        else:
            done = here(*words, *([] if "--example" in words else ["--dry-run"]), cwd=tmp_path)
        assert done.code == 0, f"{line}: {done.error}"


TRAINING = """
data = { source = "mnist-10k", image_size = 16, distortion = "none" }
model = { width = 0.05, stem = "small" }
training = { steps = 10, batch_size = 8 }
evaluation = { every = 10, population_batches = 2 }
optimizer = { rate = 0.05 }
machine = { threads = 1, device = "cpu", keep_memory = false }
"""


def test_the_page_of_folded_networks_is_what_its_rows_say():
    script = runpy.run_path(str(ROOT / "docs/folding.py"))
    assert script["page"]() == (ROOT / "docs/folding.md").read_text()
    rows = script["rows"]()
    for theirs, least, share in ((False, 80, 0.94), (True, 150, 0.92)):
        some = [row for row in rows if row["name"].startswith("timm/") == theirs]
        calls = sum(row["calls"] for row in some)
        assert len(some) >= least - 5 * (not theirs)
        assert sum(row["folded"] for row in some) >= share * calls


def test_tables_are_those_of_the_rows_that_were_measured():
    population = runpy.run_path(str(ROOT / "docs/population.py"))
    page = (ROOT / "docs/population.md").read_text()
    assert population["table"]([1]) in page and population["table"]([2, 3]) in page
    of_all_data = [row for row in population["rows"]() if "sequential" in row["method"]]
    assert len(of_all_data) == 4
    assert all(error < 1e-6 for row in of_all_data for layer in row["errors"] for error in layer)
    inserting = runpy.run_path(str(ROOT / "docs/inserting.py"))
    assert inserting["page"]() == (ROOT / "docs/inserting.md").read_text()
    assert len(inserting["rows"]()) == 10
    pruning = runpy.run_path(str(ROOT / "docs/pruning.py"))
    assert pruning["table"]() in (ROOT / "docs/pruning.md").read_text()


def test_the_tables_about_memory_are_those_that_were_measured():
    script = runpy.run_path(str(ROOT / "docs/memory.py"))
    assert script["tables"]() in (ROOT / "docs/memory.md").read_text()


def test_the_page_of_the_checks_is_what_they_say():
    script = runpy.run_path(str(ROOT / "docs/checks.py"))
    assert script["page"]() == (ROOT / "docs/checks.md").read_text()
    anchors = {f"checks.md#{anchor}" for anchor in re.findall(r"\(#(bn\d+-[a-z-]+)\)", script["page"]())}
    asked = set(re.findall(r"checks\.md#[a-z0-9-]+", (ROOT / "docs/doctor.md").read_text()))
    assert asked and asked <= anchors


def test_the_table_of_other_libraries_is_what_was_recorded():
    script = runpy.run_path(str(ROOT / "docs/bridges.py"))
    page = (ROOT / "docs/bridges.md").read_text()
    for library in script["SETTINGS"]:
        version, *errors = script["errors"](library)
        assert f"| {library} | {version} |" in page
        assert max(errors) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnasnet0_5", "timm/lcnet_035"])
def test_a_row_of_it_repeats(name):
    pytest.importorskip("timm")
    script = runpy.run_path(str(ROOT / "docs/folding.py"))
    (row,) = (row for row in script["rows"]() if row["name"] == name)
    again = script["measure"](name)
    for key in ("calls", "folded", "affine", "left alone", "known", "parameters", "operations"):
        assert list(row[key]) == list(again[key]) if isinstance(row[key], list) else row[key] == again[key]


NETS = """
from torch import nn

def unet(width):
    down = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*down, nn.ConvTranspose2d(width, 1, 2, stride=2), nn.BatchNorm2d(1), nn.Sigmoid())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [line for line in commands("batchnorm") if line.split()[1] in ("fold", "export")]
)
def test_fold_and_export_commands_run(here, forking, command, tmp_path, monkeypatch):
    """Each command of the documentation, with the files that it speaks of."""
    words = shlex.split(command)[1:]
    model = next(each for each in words if ":" in each or each == "runs/NAME")
    if model == "runs/NAME":
        (tmp_path / "run.toml").write_text(TRAINING)
        assert here("train", "run.toml", "--out", "runs/NAME", cwd=tmp_path).code == 0
    elif "--weights" in words:
        library, _, name = model.partition(":")
        made = pytest.importorskip(library)
        network = made.create_model(name) if library == "timm" else made.models.get_model(name, weights=None)
        torch.save(network.state_dict(), tmp_path / "trained.pth")
    (tmp_path / "mycode").mkdir()
    (tmp_path / "mycode" / "nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    done = here(*words, cwd=tmp_path)
    assert done.code == 0, done.error
    assert "layers: " in done.out and "left alone" not in done.out
    if "--out" in words:
        assert (tmp_path / words[words.index("--out") + 1]).stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [line for line in commands("batchnorm") if line.split()[1] in ("examine", "explain")]
)
def test_examine_and_explain_commands_run(here, command, tmp_path):
    done = here(*shlex.split(command)[1:], cwd=tmp_path)
    assert done.code in (0, 1) and "BN" in done.out, done.error


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [line for line in commands("batchnorm") if line.split()[1] in ("insert", "population", "merge")],
)
def test_insert_population_and_merge_commands_run(here, command, tmp_path):
    words = shlex.split(command)[1:]
    if words[0] == "merge":
        files = [each.partition(":")[0] for each in words[1 : words.index("--out")]]
        from safetensors.torch import save_file

        for number, file in enumerate(files):
            save_file(
                {"running_mean": torch.full((2,), float(number)), "running_var": torch.ones(2)},
                tmp_path / file,
            )
    done = here(*words, cwd=tmp_path)
    assert done.code == 0, done.error
    if "--out" in words:
        assert (tmp_path / words[words.index("--out") + 1]).stat().st_size > 100
    else:
        assert "inserted" in done.out


def test_the_table_of_keys_is_that_of_the_configuration():
    rows = re.findall(
        r"^\| `(\w+\.\w+)` \| (.*?) \| (.*) \|$", (ROOT / "docs" / "training.md").read_text(), re.M
    )
    expected = []
    for section in Config.model_fields:
        kind = InceptionModel if section == "model" else Config.model_fields[section].annotation
        assert isinstance(kind, type) and issubclass(kind, BaseModel)
        for name, field in kind.model_fields.items():
            default = "required" if field.is_required() else "–"
            if not field.is_required() and field.default is not None:
                default = f"`{literal(field.default)}`"
            assert field.description, name
            expected.append((f"{section}.{name}", default, field.description.replace("*", "\\*")))
    assert rows == expected


@pytest.mark.parametrize("command", commands("make"))
def test_make_targets_exist(command):
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_is_named_is_there(page):
    for path in re.findall(r"`(tests/[\w/.]+)`", page.read_text()):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_page_of_experiments_is_what_its_records_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    experiments = importlib.import_module("experiments")
    page = experiments.page()
    assert (ROOT / "docs" / "experiments.md").read_text() == page
    numbers = re.findall(r"[\d.]+ ± [\d.]+", (ROOT / "README.md").read_text())
    assert len(numbers) == 3
    assert all(number in page for number in numbers)


def test_the_records_of_the_documentation_are_those_of_this_code():
    head, *verdicts = read(ROOT / "docs" / "measured" / "mnist.jsonl")
    assert isinstance(head, Run)
    settings = DigitsSettings.model_validate(head.config)
    claims = {claim.name: claim for claim in mnist_experiment(settings, Digits.load()).claims}
    assert [verdict.claim for verdict in verdicts if isinstance(verdict, Verdict)] == list(claims)
    for verdict in verdicts:
        assert isinstance(verdict, Verdict)
        claim = claims[verdict.claim]
        assert (verdict.title, verdict.source, verdict.expected) == (
            claim.title,
            claim.source,
            claim.expected,
        )
        assert verdict.choices == claim.choices(settings)
