"""Some of the networks of healthy.py; `python -m tests.diagnostics.healthy` examines all."""

import pytest

from tests.diagnostics import healthy
from tests.diagnostics.test_checks import serious

SOME = ["googlenet", "mobilenet_v3_small", "shufflenet_v2_x0_5", "lraspp_mobilenet_v3_large"]
SOME += [
    f"timm:{name}"
    for name in ("efficientvit_m0", "lcnet_050", "levit_128s", "mobileone_s0", "repghostnet_050")
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SOME)
def test_nothing_serious_is_found_in_a_healthy_network(name):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
        assert name[5:] in healthy.TIMM
    number, found = healthy.examined(name)
    assert number > 10 and serious(found) == []
    assert found.skipped.keys().isdisjoint({"BN101", "BN405", "BN410"})
    assert all(each.gap < 0.25 for each in found.layers if each.gap is not None)


def test_there_are_networks_enough():
    assert len(healthy.TIMM) == len(set(healthy.TIMM)) >= 60
