"""What forwards drop or normalise by functions, which no module stands for, so that it stays."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from batchnorm.graph.nonlinearity import DROPOUT, RESPONSE


class FunctionalCalls(TorchFunctionMode):
    """Sees calls of torch.nn.functional.dropout and the like from forwards, which no module stands for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.found: dict[
            str, dict[str, None]
        ] = {}  # names of functions, by the path of the module that calls them

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if getattr(F, name, None) is function and ("dropout" in name or name == "local_response_norm"):
            self._add(name, args, kwargs or {})
        return function(*args, **(kwargs or {}))

    def _add(self, name: str, args: Any, kwargs: Any) -> None:
        given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
        if "dropout" in name and (not given.get("training", True) or not given.get("p", 0.5)):
            return
        frame = sys._getframe(2)
        while frame is not None and not isinstance(frame.f_locals.get("self"), nn.Module):
            frame = cast(Any, frame.f_back)
        module = None if frame is None else frame.f_locals["self"]
        if isinstance(module, (DROPOUT, *RESPONSE)) or type(module).__module__.startswith("torch.nn."):
            return
        path = next((path for path, each in self.model.named_modules() if each is module), "")
        self.found.setdefault(path, {})[name] = None
