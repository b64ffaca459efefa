"""Passes, which change a model: `model, report = bn.some_pass(model, ...)`. All have one contract.

Input: any torch.nn.Module, also a single layer, with layers of torch, timm or ours, which may be shared, hooked or
frozen. The model is changed in place, and layers stay the same objects, to which optimizers and hooks refer.

Output: `model` itself, and a Report with the outcome for each layer, by path, and the reason if it was left alone.

On failure a pass raises an error that names the layer and says what to do, and the model is unchanged: see rollback.py.

`virtual_batch` is not a pass but a context manager for one step.
"""
