"""Forwards of which a graph would not hold everything go on as they are."""

import random
from typing import ClassVar

import numpy
import torch

import batchnorm as bn
from tests.passes.blocks import Block, X, keeps, outcome
from tests.passes.compare import upgraded


def test_random_numbers_of_python_are_not_frozen():
    why = "it draws random numbers in Python"
    for draw in (random.random, numpy.random.rand):
        states = random.getstate(), str(numpy.random.get_state())
        _, report = bn.upgrade(Block(lambda self, x, draw=draw: self.act(self.norm(x)) * draw()))
        assert why in report["norm"].why
        assert (random.getstate(), str(numpy.random.get_state())) == states


def test_tensors_that_do_not_come_from_the_input_are_not_frozen():
    for forward in (
        lambda self, x: self.act(self.norm(x)) * torch.rand(1),
        lambda self, x: self.act(self.norm(x)) if torch.rand(()) < 0.5 else x,
    ):
        model, state = Block(forward), torch.get_rng_state()
        _, report = bn.upgrade(model)
        assert "it computes rand" in report["norm"].why
        assert torch.equal(torch.get_rng_state(), state)


def count(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return self.act(self.norm(x))


def collect(self, x):
    self.seen.append(x)
    return self.act(self.norm(x))


def test_a_forward_that_changes_its_module_goes_on_to():
    model = keeps(count, "it changes calls")
    assert model.calls == 3
    model = Block(collect)
    vars(model)["seen"] = []
    _, report = bn.upgrade(model)
    assert "it changes seen" in report["norm"].why and model.seen == []


def test_gradients_that_are_switched_off_stay_off():
    def forward(self, x):
        with torch.no_grad():
            x = self.conv(x)
        return self.act(self.norm(x))

    keeps(forward, "it disables gradients")


def test_autocast_that_is_switched_stays_so():
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.act(self.norm(x))

    keeps(forward, "it uses autocast")


def test_checkpointing_goes_on():
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(lambda x: self.act(self.norm(x)), x, use_reentrant=False)

    _, report = bn.upgrade(Block(forward))  # torch's layer counts a batch twice here: nothing to compare
    assert "it uses activation checkpointing" in report["norm"].why


def test_a_value_that_is_given_other_data_is():
    def forward(self, x):
        out = self.conv(x)
        out.data = out.data * 2
        return self.act(self.norm(out))

    keeps(forward, "it sets data of a value", gradients=False)


def test_a_class_that_keeps_a_list_of_its_subclasses_gets_one_more_at_most():
    class Registered(Block):
        subclasses: ClassVar[list[type]] = []

        def __init_subclass__(cls):
            cls.subclasses.append(cls)

    _, report = upgraded(Registered(lambda self, x: self.act(self.norm(x))), X)
    assert outcome(report) == ("fused", "relu")
    assert len(Registered.subclasses) == 1


def test_a_buffer_is_read_at_each_call():
    def forward(self, x):
        self.calls.add_(1)
        return self.act(self.norm(x)) * self.calls

    model = Block(forward)
    model.register_buffer("calls", torch.zeros(()))
    _, report = upgraded(model, X)
    assert outcome(report) == ("fused", "relu")
