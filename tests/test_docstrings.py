"""Every public name says what it takes, returns and raises, and shows an example that runs."""

import ast
import builtins
import doctest
import inspect
import re
import textwrap

import pytest

import batchnorm as bn
from batchnorm.calibrate.adapt import Adaptation
from batchnorm.passes.report import LayerReport, Report
from batchnorm.statistics import Statistics

LAYERS = (bn.BatchNorm, bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d)


MODULES = {"kernels": ("active", "instruction_set", "use"), "bridges": ("read", "write")}


def methods(cls):
    """The public methods that a class defines; what torch's layers and `Statistics` say of theirs holds for ours."""
    if cls in LAYERS:
        return {"forward": cls.forward}
    called = set() if issubclass(cls, Statistics) else {"__call__", "__getitem__"}
    return {
        name: getattr(cls, name)
        for name in vars(cls)
        if (name in called or name[0] != "_") and callable(getattr(cls, name))
    }


def documented():
    """All that a user calls, by its name."""
    found = {name: getattr(bn, name) for name in dir(bn) if name != "__version__"}
    for module, names in MODULES.items():
        found |= {f"{module}.{name}": getattr(found[module], name) for name in names}
    found |= {each.__name__: each for each in (Adaptation, LayerReport, Report)}  # what passes return
    for name, each in list(found.items()):
        if inspect.isclass(each):
            found |= {f"{name}.{method}": function for method, function in methods(each).items()}
    return found


DOCUMENTED = documented()
CALLED = {name: each for name, each in DOCUMENTED.items() if name not in (*MODULES, "Adaptation")}


def doc(each):
    return inspect.getdoc(each) or ""


def entries(each, section):
    """The names that a section lists, each with what is said of it; None where there is no such section."""
    found = re.search(rf"^{section}:\n((?:    .*\n|\n)*)", doc(each) + "\n", re.MULTILINE)
    if found is None:
        return None
    return dict(re.findall(r"^    (\w+): *(.*)", found[1], re.MULTILINE))


def parameters(each):
    return [name for name in inspect.signature(each).parameters if name not in ("self", "cls")]


def returned(each):
    """The section that says what comes back, or None where nothing does."""
    if inspect.isclass(each):
        return None
    if inspect.isgeneratorfunction(inspect.unwrap(each)):
        return "Yields"
    return None if inspect.signature(each).return_annotation in ("None", None) else "Returns"


def raised(each):
    """The types of the errors that the code of a function, or of a class's constructor, raises by name."""
    functions = [each]
    if inspect.isclass(each):
        functions = [vars(each)[name] for name in ("__init__", "__post_init__") if name in vars(each)]
    types = set()
    for function in functions:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
        except (OSError, TypeError):  # written by dataclass
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                types.add(ast.unparse(node.exc.func))
    return types


@pytest.mark.parametrize("name", DOCUMENTED)
def test_it_begins_with_a_sentence(name):
    first, *rest = doc(DOCUMENTED[name]).split("\n")
    assert re.fullmatch(r"\S.*\.", first)
    assert not rest or rest[0] == ""


@pytest.mark.parametrize("name", CALLED)
def test_it_lists_its_arguments(name):
    listed = entries(CALLED[name], "Args")
    assert list(listed or ()) == parameters(CALLED[name])
    assert all((listed or {}).values())


@pytest.mark.parametrize("name", CALLED)
def test_it_says_what_it_returns(name):
    section = returned(CALLED[name])
    assert section is None or re.search(rf"^{section}: \S", doc(CALLED[name]), re.MULTILINE)


@pytest.mark.parametrize("name", CALLED)
def test_it_lists_its_errors(name):
    listed = entries(CALLED[name], "Raises")
    if listed is None:
        assert "Raises" not in doc(CALLED[name])
    types = set(listed or ())
    assert raised(CALLED[name]) <= types
    assert all(issubclass(getattr(builtins, each), Exception) for each in types)
    assert all((listed or {}).values())


@pytest.mark.parametrize("name", DOCUMENTED)
def test_its_example_runs(name):
    test = doctest.DocTestParser().get_doctest(doc(DOCUMENTED[name]), {}, name, None, None)
    assert test.examples
    assert "Example:" in doc(DOCUMENTED[name])
    said: list[str] = []
    failed = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(test, out=said.append).failed
    assert not failed, "".join(said)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_s_help_is_complete(layer):
    assert "{" not in doc(layer)
    assert f"bn.{layer.__name__}(" in doc(layer)


def added(x, of_no_line=0):  # noqa: D417  # that is what must be seen
    """Add a parameter that has no line.

    Args:
        x: has one.
    """
    if x:
        raise LookupError("that is not listed")


def test_what_is_not_said_is_seen(monkeypatch):
    monkeypatch.setitem(CALLED, "added", added)
    monkeypatch.setitem(DOCUMENTED, "added", added)
    for test in (test_it_lists_its_arguments, test_it_says_what_it_returns, test_it_lists_its_errors):
        with pytest.raises(AssertionError):
            test("added")
    with pytest.raises(AssertionError):
        test_its_example_runs("added")
