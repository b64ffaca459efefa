"""The report of a pass."""

import pytest

from batchnorm.passes.report import LayerReport, Report

REPORT = Report(
    (
        LayerReport("", "left alone", why="is ours already"),
        LayerReport("stem.1", "fused", "residual, relu"),
        LayerReport("head.norm", "swapped", why="no activation follows"),
        LayerReport("tail", "swapped", why="GELU has no fused kernel"),
    )
)


def test_a_report_is_a_table():
    assert str(REPORT) == repr(REPORT) == (
        "(the model)  left alone  is ours already\n"
        "stem.1       fused       residual, relu\n"
        "head.norm    swapped     no activation follows\n"
        "tail         swapped     GELU has no fused kernel\n"
        "4 layers: 1 fused, 2 swapped, 1 left alone"
    )  # fmt: skip
    assert Report(REPORT.layers[1:2]).summary == "1 layer: 1 fused"
    assert str(Report(())) == "0 layers"


def test_a_layer_is_found_by_its_name():
    assert REPORT["stem.1"].what == "residual, relu"
    assert REPORT.count("swapped") == 2
    with pytest.raises(KeyError, match=r"'nothing' is not among .*'stem.1'"):
        REPORT["nothing"]
