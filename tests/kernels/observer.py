"""A dispatch mode that lets every operator be."""

from torch.utils._python_dispatch import TorchDispatchMode


class Observer(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.operators.append(operator)
        return operator(*args, **(kwargs or {}))
