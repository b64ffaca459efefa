"""Batches depend on seed and step alone, whoever loads them; broken images are replaced or left out, and counted."""

import itertools
import os

import pytest
import torch

pytest.importorskip("PIL", reason="images come with the extra")

from batchnorm.data.catalogue import load
from batchnorm.data.corrupt import Corrupt
from batchnorm.data.idx import DataError
from batchnorm.data.loader import Loader, SequentialLoader
from batchnorm.data.order import Order
from batchnorm.data.source import InMemory, Unreadable
from tests.data.pictures import image_folder
from tests.mutations.mutation import Mutation

EXAMPLES = 50


def numbered(examples=EXAMPLES):
    """Images of one pixel, which is their number."""
    numbers = torch.arange(examples)
    return InMemory(numbers.byte().reshape(-1, 1, 1, 1), numbers, examples, "numbered")


class Holed:
    """A source some of whose images cannot be read."""

    shards, channels = None, 1

    def __init__(self, bad, examples=EXAMPLES):
        self._whole, self.bad, self.classes, self.asked = numbered(examples), set(bad), examples, 0

    def __len__(self):
        return len(self._whole)

    def __getitem__(self, index):
        self.asked += 1
        if index in self.bad:
            raise Unreadable(self.name(index), "a hole")
        return self._whole[index]

    def name(self, index):
        return f"hole {index}"


def noisy(image):
    return image.float() + torch.rand(3, 4, 4)


def averaged(image):
    """A sum whose last bits depend on the number of threads, and the noise beside it."""
    return torch.stack((torch.rand(400_000).sum(), image.float().sum()))


def loader(source, transform=torch.Tensor.float, share=0.5, *, batch_size=10, seed=0, **ranks):
    return Loader(
        source, transform, Order(len(source), batch_size, seed=seed), Corrupt(share, len(source)), **ranks
    )


def first(count, loader, step=0):
    return list(itertools.islice(loader.batches(itertools.count(step)), count))


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_a_batch_holds_the_images_of_its_step_and_their_labels():
    source = numbered()
    loading, order = loader(source), Order(EXAMPLES, 10)
    assert loading.batches_per_epoch == 5
    for step, (images, labels) in enumerate(first(12, loading)):
        assert torch.equal(labels, order.batch(step))
        assert (images.dtype, labels.dtype, images.shape) == (torch.float32, torch.int64, (10, 1, 1, 1))
        assert torch.equal(images.flatten().long(), labels)


def test_any_steps_may_be_asked_for():
    loading = loader(numbered(), noisy)
    whole = first(20, loading)
    assert same(list(loading.batches(range(0, 20, 7))), whole[0:20:7])
    assert same(first(3, loading, step=17), whole[17:])


def test_distortions_follow_from_seed_epoch_and_example():
    source = numbered()

    def noise(seed, epoch):
        batches = loader(source, noisy, seed=seed).batches(range(5 * epoch, 5 * epoch + 5))
        noise = {
            int(label): image - label
            for images, labels in batches
            for image, label in zip(images, labels, strict=True)
        }
        return torch.stack([noise[number] for number in range(EXAMPLES)])

    seen = [noise(0, 0), noise(1, 0), noise(0, 1)]
    for each in seen:
        assert len({tuple(example.flatten().round(decimals=3).tolist()) for example in each}) == EXAMPLES
    assert all((a - b).abs().amax((1, 2, 3)).min() > 0.1 for a, b in itertools.combinations(seen, 2))
    small = Loader(source, noisy, Order(EXAMPLES, 5), Corrupt(0.5, EXAMPLES))  # in other batches the same
    (image, *_), (label, *_) = next(small.batches([0]))
    assert torch.allclose(image - label, seen[0][int(label)], atol=1e-5)


def test_the_global_generator_and_the_threads_are_as_before():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        for loading in (loader(numbered(), noisy), loader(numbered(), fails)):
            batches = loading.batches(range(3))
            for _ in range(2):
                try:
                    next(batches)
                except ArithmeticError:
                    break
                assert torch.get_num_threads() == 2
                assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)


def fails(image):
    raise ArithmeticError(f"drew {torch.rand(())}")


@pytest.mark.slow
def test_processes_load_the_same_bits_and_bring_the_tally(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        source = Holed({3, 4, 20})
        alone, apart = loader(source, averaged), loader(source, averaged, processes=2)
        expected = first(12, alone)
        assert same(first(12, apart), expected)
        assert (
            alone.corrupt.found == apart.corrupt.found == {f"hole {index}": "a hole" for index in (3, 4, 20)}
        )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_processes_bring_the_error(tmp_path):
    apart = loader(Holed({3, 4, 20}), share=0.04, processes=1)
    with pytest.raises(DataError, match=r"^3 of 50 images cannot be read: [^\n]*stop a run[^\n]*$"):
        first(6, apart)


@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_load_together_what_one_loads_alone(ranks):
    source = Holed({7, 30})
    expected = first(7, loader(source, noisy))
    parts = [first(7, loader(source, noisy, rank=rank, ranks=ranks)) for rank in range(ranks)]
    for step, whole in enumerate(expected):
        assert torch.equal(torch.cat([part[step].images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part[step].labels for part in parts]), whole.labels)


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused_at_once():
    with pytest.raises(ValueError, match="10 does not divide among 3"):
        loader(numbered(), ranks=3)


def test_the_next_that_can_be_read_takes_the_place_of_a_hole():
    bad = {0, 3, 4, 49}
    stand_in = {0: 1, 3: 5, 4: 5, 49: 1}
    loading, order = loader(Holed(bad)), Order(EXAMPLES, 10)
    for step, (images, labels) in enumerate(first(10, loading)):
        wanted = [stand_in.get(index, index) for index in order.batch(step).tolist()]
        assert labels.tolist() == images.flatten().tolist() == wanted
    assert sorted(loading.corrupt.names) == sorted(f"hole {index}" for index in bad)


def test_the_run_ends_with_the_first_hole_too_many():
    loading = loader(Holed(range(0, 50, 10)), share=0.08)
    with pytest.raises(DataError, match=r"5 of 50 images cannot be read: hole .*and 2 more"):
        first(5, loading)
    assert len(loading.corrupt) == 5
    patient = loader(Holed(range(0, 50, 10)), share=0.1)
    assert len(first(20, patient)) == 20


def test_reading_ends_soon_where_nothing_can_be_read():
    source = Holed(range(10_000), 10_000)
    with pytest.raises(DataError, match="101 of 10,000"):
        first(1, loader(source, share=0.01))
    assert source.asked == 101
    with pytest.raises(DataError, match="none of the 50 images can be read"):
        first(1, loader(Holed(range(50)), share=1.0))


def test_a_pass_in_order_has_each_example_once():
    whole = numbered()
    in_order = SequentialLoader(whole, noisy, 8, Corrupt(0, EXAMPLES))
    for _ in range(2):
        batches = list(in_order)
        assert [len(labels) for _, labels in batches] == [8] * 6 + [2]
        assert torch.equal(torch.cat([labels for _, labels in batches]), torch.arange(EXAMPLES))
    assert in_order.rounds == 7


@pytest.mark.parametrize(("ranks", "rounds"), [(2, 4), (3, 3), (7, 1), (60, 1)])
def test_ranks_share_a_pass_out(ranks, rounds):
    parts = [
        SequentialLoader(numbered(), noisy, 8, Corrupt(0, EXAMPLES), rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    batches = [list(part) for part in parts]
    assert torch.equal(torch.cat([labels for part in batches for _, labels in part]), torch.arange(EXAMPLES))
    assert {part.rounds for part in parts} == {rounds} == {max(map(len, batches))}
    sizes = [sum(len(labels) for _, labels in part) for part in batches]
    assert max(sizes) - min(sizes) <= 1


def test_a_pass_leaves_holes_out_and_counts_them():
    in_order = SequentialLoader(Holed({1, *range(8, 16), 49}), torch.Tensor.float, 8, Corrupt(0.2, EXAMPLES))
    labels = [labels.tolist() for _, labels in in_order]
    assert labels[0] == [0, 2, 3, 4, 5, 6, 7]
    assert labels[1][0] == 16  # the batch without any is left out whole
    assert labels[-1] == [48]
    assert len(in_order.corrupt) == 10
    with pytest.raises(DataError, match="10 of 50"):
        list(SequentialLoader(Holed({1, *range(8, 16), 49}), torch.Tensor.float, 8, Corrupt(0.18, EXAMPLES)))


def test_a_folder_with_broken_files_trains_and_evaluates(tmp_path):
    root = image_folder(tmp_path, train=10, val=5)
    (root / "train" / "cat" / "03.jpg").write_bytes(b"")
    (root / "train" / "dog" / "09.jpg").write_text("a note")
    torn = root / "val" / "cat" / "02.jpg"
    torn.write_bytes(torn.read_bytes()[:200])
    train, val = load(str(root), "train"), load(str(root), "val")
    loading = loader(train, batch_size=4, share=0.1)
    for images, _ in first(5, loading):
        assert images.shape == (4, 3, 12, 10)
    assert sorted(map(os.path.basename, loading.corrupt.names)) == ["03.jpg", "09.jpg"]
    in_order = SequentialLoader(val, torch.Tensor.float, 4, Corrupt(0.1, len(val)))
    assert [len(labels) for _, labels in in_order] == [3, 4, 2]
    assert in_order.corrupt.names == [str(torn)]


MUTATIONS = [
    Mutation(
        "distortion by the clock", "data/loader.py",
        "torch.default_generator.manual_seed(derive_seed(self.seed, request.epoch, at % examples))", 'pass',
        "a sample's distortion follows from seed and epoch",
    ),
]  # fmt: skip
