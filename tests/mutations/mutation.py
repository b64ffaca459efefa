"""A deliberate fault, which must turn tests red, and where all of them are; `python -m tests.mutations` tries them."""

import importlib
from dataclasses import dataclass, replace
from pathlib import Path

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """`old`, which stands exactly once in src/batchnorm/`file`, becomes `new`; `tests` must notice, with `kernels`."""

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...] = ()  # the file that it stands beside, when that is one of tests
    kernels: str = "native"


def every() -> list[Mutation]:
    """Those of the arithmetic, and those that stand beside the tests that catch them."""
    from tests.mutations.mutations import MUTATIONS

    found = list(MUTATIONS)
    for path in sorted(TESTS.rglob("test_*.py")):
        if "\nMUTATIONS = [" in path.read_text():
            file = path.relative_to(TESTS)
            module = importlib.import_module(".".join(["tests", *file.with_suffix("").parts]))
            beside: list[Mutation] = module.MUTATIONS
            found += [replace(mutation, tests=mutation.tests or (file.as_posix(),)) for mutation in beside]
    return found
