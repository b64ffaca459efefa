"""Scores count right answers."""

import torch
from torch import nn

from batchnorm.training.score import Score, probabilities

LABELS = torch.tensor([0, 1, 2, 6])


def ranked(*classes):
    """Probabilities that are the higher, the earlier a class is named."""
    row = torch.zeros(7)
    row[list(classes)] = torch.arange(len(classes), 0, -1.0)
    return row


def test_right_answers_are_counted_among_one_and_among_five():
    rows = [
        ranked(0, 1, 2, 3, 4, 5),
        ranked(0, 1, 3, 4, 5),
        ranked(0, 1, 3, 4, 2, 5),
        ranked(0, 1, 2, 3, 4, 6),
    ]
    score = Score.of(torch.stack(rows), LABELS)
    assert score == Score(images=4, top1=1, top5=3)
    assert (score.accuracy, score.accuracy_top5) == (0.25, 0.75)


def test_of_fewer_than_five_classes_all_are_among_five():
    assert Score.of(torch.eye(3), torch.tensor([0, 0, 0])) == Score(3, 1, 3)


def test_scores_of_parts_add_up_to_that_of_the_whole():
    rows, labels = torch.rand(20, 7), torch.randint(7, (20,))
    parts = (Score.of(rows[at : at + 6], labels[at : at + 6]) for at in range(0, 20, 6))
    assert sum(parts, Score()) == Score.of(rows, labels)


def test_of_no_image_nothing_is_counted():
    assert Score.of(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long)) == Score()


def test_of_one_crop_each_they_are_the_softmax():
    network, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), torch.randn(5, 3, 2, 2)
    torch.testing.assert_close(probabilities(network, images), network(images).softmax(1).detach())
