"""The import ladder of docs/architecture.md, as data, held against the imports that the source really has."""

import ast
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import batchnorm

# Each may import only what stands above it; those on one rung do not import each other.
LADDER = (
    ("atomic_file", "children", "guards", "layer_path", "memory", "moments", "records", "requirements"),
    ("kernels", "report"),
    ("functional",),
    ("running", "statistics"),
    ("layers",),
    ("bridges", "graph", "lazy_layers"),
    ("calibrate",),
    ("passes",),
    ("data", "diagnostics", "models"),
    ("training",),
    ("bench", "experiments"),
    ("cli",),
)
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
RUNGS = {module: rung for rung, modules in enumerate(LADDER) for module in modules}
SOURCE = Path(batchnorm.__file__).parent
HOME: Mapping[str, str] = batchnorm._HOME


def offences(source: Path, home: Mapping[str, str]) -> list[str]:
    """What is wrong with the imports of the package in folder `source`, whose public names live in `home`."""
    found = []
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        where = path.relative_to(source)
        if parts == ("__init__",):
            lines = [line for line, _ in _imports(_eager(path), source.name, parts, home)]
            found += [
                f"{where}:{line}: imports from the package before a name is asked for" for line in lines
            ]
            continue
        if parts[0] not in RUNGS:
            found.append(f"{where}: {parts[0]} stands on no rung of the ladder")
            continue
        for line, target in _imports(ast.parse(path.read_text()), source.name, parts, home):
            if target != parts[0] and not RUNGS.get(target, len(LADDER)) < RUNGS[parts[0]]:
                found.append(f"{where}:{line}: {parts[0]} may not import {target}")
    return found


def _eager(path: Path) -> ast.Module:
    """The statements of a module that run when it is imported, type checkers' imports left out."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    stripped: ast.Module = Strip().visit(ast.parse(path.read_text()))
    return stripped


def _imports(
    tree: ast.AST, package: str, parts: tuple[str, ...], home: Mapping[str, str]
) -> Iterator[tuple[int, str]]:
    """(line, first name below the package) of each import of the package, wherever in the module it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` in a/b.py and in a/__init__.py alike means the package a
            base = [package, *parts[: len(parts) - node.level]] if node.level else []
            base += [node.module] if node.module else []
            targets = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for target in targets:
            if target == package:  # `import batchnorm` reaches every public name
                yield from ((node.lineno, module) for module in sorted(set(home.values())))
            elif target.startswith(f"{package}.") and target != f"{package}.__version__":
                name = target.split(".")[1]
                yield node.lineno, home.get(name, name).split(".")[0]


def test_each_module_imports_only_what_stands_above_it():
    assert offences(SOURCE, HOME) == []


def test_every_rung_is_there():
    assert {module for rung in LADDER for module in rung} == {
        path.stem for path in SOURCE.iterdir() if path.name[0] != "_" and path.suffix in ("", ".py")
    }


def test_the_page_shows_the_ladder():
    """Writes it there when it has changed: look at the difference, and commit it."""
    rungs = [f"{{{', '.join(rung)}}}" if len(rung) > 1 else rung[0] for rung in LADDER]
    lines = textwrap.wrap(" < ".join(rungs), 110, break_long_words=False, break_on_hyphens=False)
    before = PAGE.read_text()
    begin, end = "<!-- the ladder: written by tests/test_architecture.py -->\n", "<!-- end of the ladder -->"
    head, _, rest = before.partition(begin)
    after = (
        head
        + begin
        + "\n"
        + "\n".join(f"    {line}" for line in lines)
        + "\n\n"
        + end
        + rest.partition(end)[2]
    )
    if before != after:
        PAGE.write_text(after)
    assert before == after, f"{PAGE} showed another ladder: it has been rewritten"


def test_no_two_files_have_one_name():
    names = Counter(
        path.name for path in SOURCE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")
    )
    assert [name for name, number in names.items() if number > 1] == []


@pytest.mark.parametrize(
    ("path", "text", "offence"),
    [
        ("moments.py", "import batchnorm.layers", "moments may not import layers"),
        ("moments.py", "from batchnorm import layers", "moments may not import layers"),
        ("moments.py", "from batchnorm.layers import BatchNorm2d", "moments may not import layers"),
        ("moments.py", "from .layers import BatchNorm2d", "moments may not import layers"),
        ("moments.py", "from batchnorm import BatchNorm2d", "moments may not import layers"),
        ("moments.py", "import batchnorm as bn", "moments may not import layers"),
        ("moments.py", "def f():\n    from .layers import BatchNorm2d", "moments may not import layers"),
        ("kernels/ops.py", "from ..functional import batch_norm", "kernels may not import functional"),
        ("kernels/__init__.py", "from .. import functional", "kernels may not import functional"),
        ("report/page.py", "from batchnorm import kernels", "report may not import kernels"),
        ("layers.py", "from batchnorm.extras import x", "layers may not import extras"),
        ("extras.py", "", "extras stands on no rung"),
        ("__init__.py", "from batchnorm.layers import BatchNorm2d", "before a name is asked for"),
        (
            "__init__.py",
            "try:\n    from . import layers\nexcept ImportError: pass",
            "before a name is asked for",
        ),
    ],
)
def test_the_checker_sees_an_offence(tmp_path, path, text, offence):
    file = tmp_path / "batchnorm" / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    (found,) = offences(tmp_path / "batchnorm", {"BatchNorm2d": "layers"})
    assert offence in found


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "layers.py",
            "import torch\nfrom batchnorm import functional, __version__\nfrom .kernels import ops",
        ),
        ("kernels/ops.py", "from . import reference\nfrom batchnorm.kernels.reference import moments"),
        ("kernels/native/build.py", "from ..ops import x\nfrom ...moments import Moments"),
        ("cli/bench.py", "import batchnorm as bn"),
        ("__init__.py", "if TYPE_CHECKING:\n    from .layers import x\ndef f():\n    from . import layers"),
    ],
)
def test_the_checker_lets_pass_what_the_ladder_allows(tmp_path, path, text):
    file = tmp_path / "batchnorm" / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert offences(tmp_path / "batchnorm", {"BatchNorm2d": "layers"}) == []


def test_what_needs_no_torch_imports_none():
    # A page is rebuilt, and --help printed, where torch would cost seconds or is not installed at all.
    script = """
import importlib, pkgutil, sys
for name in ("children", "memory", "records", "report", "cli"):
    module = importlib.import_module(f"batchnorm.{name}")
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), module.__name__ + "."):
        importlib.import_module(found.name)
    if "torch" in sys.modules:
        sys.exit(f"{name} imports torch")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
