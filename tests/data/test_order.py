"""The order of examples follows from seed and step alone; shards decide what may meet in a batch."""

import pytest
import torch

from batchnorm.data.idx import DataError
from batchnorm.data.order import Order, derive_seed
from tests.mutations.mutation import Mutation


def epoch(order, number):
    first = number * order.batches_per_epoch
    return torch.cat([order.batch(step) for step in range(first, first + order.batches_per_epoch)])


def in_shards(indices, size):
    """The shard of each index, each run of equal ones once."""
    return [int(shard) for shard in torch.unique_consecutive(indices // size)]


@pytest.mark.parametrize("shuffle", ["shards", "within-shards"])
@pytest.mark.parametrize("shards", [None, (50, 10, 0, 39, 1)])
def test_an_epoch_has_each_example_once_but_for_the_remainder(shuffle, shards):
    order = Order(100, 7, shards=shards, shard_size=9, shuffle=shuffle)
    assert order.batches_per_epoch == 14
    missing = []
    for number in range(6):
        seen = epoch(order, number)
        assert seen.dtype == torch.int64
        assert len(seen) == len(seen.unique()) == 98
        missing.append(sorted(set(range(100)) - set(seen.tolist())))
    assert missing[0] != missing[1] != missing[2]  # the remainder is not the same every time


def test_any_step_is_the_same_wherever_the_run_began():
    asked = Order(100, 7, seed=3, shards=(50, 50))
    forwards = [asked.batch(step) for step in range(50)]
    for step in reversed(range(50)):
        assert torch.equal(Order(100, 7, seed=3, shards=(50, 50)).batch(step), forwards[step])
        assert torch.equal(asked.batch(step), forwards[step])


@pytest.mark.parametrize("shards", [None, (50, 50)])
def test_seeds_and_epochs_differ(shards):
    one, other = Order(100, 10, seed=1, shards=shards), Order(100, 10, seed=2, shards=shards)
    assert not torch.equal(one.batch(0), other.batch(0))
    assert not torch.equal(epoch(one, 0), epoch(one, 1))
    assert not torch.equal(epoch(one, 1), epoch(other, 0))  # a seed plus the epoch would be


def test_shards_come_whole_and_in_another_order_each_epoch():
    for shuffle in ("shards", "within-shards"):
        order = Order(1000, 10, shards=[100] * 10, shuffle=shuffle)
        shards = [in_shards(epoch(order, number), 100) for number in range(3)]
        assert all(sorted(each) == list(range(10)) for each in shards)
        assert shards[0] != shards[1] != shards[2] != shards[0]


def test_shuffling_shards_keeps_company_together_and_shuffling_within_them_does_not():
    def company(shuffle, shards):
        """How often 5 meets each other example in a batch, of 20 epochs."""
        order = Order(200, 10, shards=shards, shard_size=50, shuffle=shuffle)
        batches = [order.batch(step) for step in range(20 * order.batches_per_epoch)]
        met = torch.cat([batch for batch in batches if (batch == 5).any()]).bincount(minlength=200)
        met[5] = 0
        return met

    for shards in (None, (50,) * 4):
        always = company("shards", shards)
        assert sorted(always.tolist(), reverse=True)[:10] == [20] * 9 + [0]
        mixed_up = company("within-shards", shards)
        assert mixed_up.max() < 13
        assert (mixed_up > 0).sum() > 30  # nearly everyone in the shard
        assert (mixed_up > 0).sum() < 50  # and nobody else


def test_the_order_inside_a_shard_file_is_the_files_own():
    order = Order(100, 10, shards=(50, 50), shuffle="shards")
    seen = epoch(order, 0)
    assert seen.tolist() in ([*range(100)], [*range(50, 100), *range(50)])


def test_data_sorted_by_class_is_dealt_at_random_and_always_alike():
    labels = torch.arange(1000) // 100
    one = Order(1000, 100, shard_size=100, shuffle="shards", seed=1)
    other = Order(1000, 100, shard_size=100, shuffle="shards", seed=2)
    for step in range(10):
        assert len(labels[one.batch(step)].unique()) > 5
    pieces = {tuple(one.batch(step).tolist()) for step in range(10)}
    assert {tuple(other.batch(step).tolist()) for step in range(10)} == pieces


def test_shards_smaller_than_a_batch_and_of_one_example():
    order = Order(100, 32, shard_size=1, shuffle="shards")
    assert len(epoch(order, 0).unique()) == 96
    assert not torch.equal(epoch(order, 0), epoch(order, 1))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_see_together_what_one_sees_alone(ranks):
    order = Order(100, 12)
    for step in (0, 7, 8, 30):
        parts = [order.batch(step, rank, ranks) for rank in range(ranks)]
        assert {len(part) for part in parts} == {12 // ranks}
        assert torch.equal(torch.cat(parts), order.batch(step))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch of 12 does not divide among 5"):
        Order(100, 12).batch(0, 0, 5)


def test_too_few_examples_are_an_error_of_the_data():
    with pytest.raises(DataError, match="31 training images do not fill one batch of 32"):
        Order(31, 32)
    assert Order(32, 32).batches_per_epoch == 1


def test_shards_must_add_up():
    with pytest.raises(ValueError, match="90 examples together, not 100"):
        Order(100, 10, shards=(50, 40))


def test_mixed_seeds_differ_wherever_the_numbers_do():
    seeds = {
        derive_seed(*numbers)
        for numbers in [(0, 1), (1, 0), (0, 0), (0,), (0, 0, 0), (10, 1), (1, 1), (1, 11)]
    }
    assert len(seeds) == 8
    assert all(0 <= seed < 2**32 for seed in seeds)


MUTATIONS = [
    Mutation(
        "a rank reads all of the batch", "data/order.py",
        "start = at * self.batch_size + rank * share", "start = at * self.batch_size",
        "processes share a batch",
    ),
    Mutation(
        "examples always in the same order", "data/order.py",
        'if self.shuffle == "within-shards":', 'if self.shuffle == "shards":',
        "item 6 the wrong way round",
    ),
]  # fmt: skip
