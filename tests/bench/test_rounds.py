"""The order of the turns, and the arithmetic of what they took, with candidates that only say a number."""

import gc
from itertools import count

import pytest

from batchnorm.bench.rounds import interleave, quartiles, times


def candidate(name, calls, seconds=1.0):
    def sample():
        calls.append(name)
        return {"step": seconds}

    return sample


def test_each_round_begins_with_another_and_none_is_left_out():
    calls: list[str] = []
    rounds = interleave({name: candidate(name, calls) for name in "abc"}, seconds=0, least=4)
    in_rounds = ["".join(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert in_rounds == ["abc", "bca", "abc", "bca", "cab", "abc"]  # the first two are warm-up
    assert len(rounds) == 4


def test_rounds_go_on_until_the_time_is_up():
    clock = count().__next__  # a second at each look
    rounds = interleave({"a": candidate("a", [])}, seconds=5, least=2, clock=lambda: float(clock()))
    assert (
        len(rounds) == 2 + 4
    )  # it is looked at after the first two: at 1, 2, 3 and 4 there is time for another


def test_the_garbage_collector_rests_and_comes_back_even_after_an_interruption():
    def interrupted():
        assert not gc.isenabled()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"a": interrupted}, seconds=0, least=1)
    assert gc.isenabled()


def test_a_ratio_is_taken_within_a_round():
    # the machine slows down tenfold: in each round torch takes twice, 2 and 4 times what ours takes
    rounds = [
        {"ours": {"step": 1.0}, "torch": {"step": 2.0}},
        {"ours": {"step": 1.0}, "torch": {"step": 2.0}},
        {"ours": {"step": 10.0}, "torch": {"step": 40.0}},
    ]
    torch = times(rounds, "step")["torch"]
    assert (torch.ms, torch.low, torch.high) == (2000, 2000, 21000)
    assert (torch.over_ours_low, torch.over_ours, torch.over_ours_high) == (2, 2, 3)
    assert torch.copies is None


def test_forward_and_backward_together_are_a_sum_within_a_round_and_a_copy_is_one_copy():
    rounds = [
        {"ours": {"forward": f, "backward": b}, "torch": {"forward": 3 * f, "backward": b}, "copy": {"copy": c}}
        for f, b, c in ((1.0, 2.0, 0.5), (2.0, 1.0, 1.0), (4.0, 4.0, 2.0))
    ]  # fmt: skip
    both = times(rounds, "both")
    assert both["ours"].ms == 3000
    assert both["ours"].copies == 4  # of 6, 3 and 4
    assert both["torch"].over_ours == 2  # of 5/3, 7/3 and 2
    assert both["copy"].copies == 1
    assert times(rounds, "backward")["ours"].copies == 2  # of 4, 1 and 2


def test_quartiles():
    assert quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == (2, 3, 4)
    assert quartiles([7.0]) == (7, 7, 7)
