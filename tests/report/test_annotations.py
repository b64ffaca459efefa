"""Annotations of GitHub, read by a parser of the format that its documentation and its runner describe."""

import re
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.report.annotations import github
from batchnorm.report.examined import Examined, Explained

from . import doctor_sample
from .doctor_sample import row


@dataclass
class Command:
    """What `::name key=value,key=value::data` says."""

    name: str
    properties: dict[str, str]
    data: str


def parsed(line):
    """As GitHub's runner does: the next "::" ends the properties, "," parts them, and then escapes are undone."""
    found = re.fullmatch(r"::(error|warning|notice) (.*?)::(.*)", line, re.DOTALL)
    assert found, line
    name, properties, data = found.groups()
    pairs = [each.split("=", 1) for each in properties.split(",")]
    escapes = {"%25": "%", "%0D": "\r", "%0A": "\n"}
    own = {**escapes, "%3A": ":", "%2C": ","}

    def plain(text, known):
        assert set(re.findall("%..", text)) <= set(known), text  # no other escape, and no bare %
        return re.sub("%..", lambda each: known[each[0]], text)

    return Command(name, {key: plain(value, own) for key, value in pairs}, plain(data, escapes))


def commands(examined, **options):
    text = github(examined, **options)
    assert text == "" or text.endswith("\n")
    assert "\r" not in text
    return [parsed(line) for line in text.split("\n")[:-1]]


def test_each_finding_is_a_line_the_worst_first():
    examined = doctor_sample.examined()
    found = commands(examined)
    assert [each.name for each in found] == ["error"] * 2 + ["warning"] * 10 + ["notice"] * 53
    assert found[0].properties == {"title": "BN101 evaluation-depends-on-the-batch"}
    assert found[1].properties == {"title": "BN302"}  # nothing is said about the check
    assert found[1].data == (
        "(the model): some layers are in evaluation mode and others in training. model.train()"
    )
    assert found[2].data.startswith("layer3.1.bn2: in evaluation its outputs are 0.64 standard deviations")
    assert found[2].data.endswith("have changed since. bn.population(model, batches)")


def test_the_line_as_github_reads_it():
    checks = {"BN201": Explained("momentum", "warning", "", "", "")}
    examined = Examined(
        "m", [row("BN201", "layer1.0.bn1", "momentum is 0: never 100 %", "a, b:c")], checks=checks
    )
    assert github(examined) == (
        "::warning title=BN201 momentum::layer1.0.bn1: momentum is 0: never 100 %25. a, b:c\n"
    )
    assert github(examined, "a,b:c.py") == (
        "::warning file=a%2Cb%3Ac.py,line=1,title=BN201 momentum::layer1.0.bn1: momentum is 0: never 100 %25. a, b:c\n"
    )


def test_nothing_found_is_nothing_printed():
    assert github(Examined("m")) == ""


@pytest.mark.parametrize(
    "evil", ["%0A", "::error::x", "a\r\n::error::x", "%25", ",file=x", "=", "%", "\n", "a::b"]
)
def test_words_cannot_end_what_they_are_in(evil):
    checks = {"BN201": Explained(evil, "warning", "", "", "")}
    examined = Examined("m", [row("BN201", evil, evil, evil), row("BN201", "", "last")], checks=checks)
    first, last = commands(examined, file=evil)
    assert first.properties == {"file": evil, "line": "1", "title": f"BN201 {evil}".rstrip()}
    assert first.data == f"{evil}: {evil}. {evil}".rstrip()
    assert last.data == "(the model): last."


@given(st.text(min_size=1), st.text(min_size=1), st.text(min_size=1))
def test_whatever_is_said_is_read_again(layer, message, file):
    (found,) = commands(Examined("m", [row("BN201", layer, f"{message}.", "do()")]), file=file)
    assert found.data == f"{layer}: {message}. do()"
    assert found.properties["file"] == file


def test_letters_that_no_terminal_takes_are_replaced():
    text = github(Examined("m", [row("BN201", "a\udcff", "b\ud800")]), "c\udfff.py")
    assert text.encode() and text == "::warning file=c?.py,line=1,title=BN201::a?: b?.\n"
