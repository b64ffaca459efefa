"""What changes a model: `model, report = bn.some_pass(model, ...)`, by one contract for all.

What comes in: any torch.nn.Module, with layers of torch's, timm's or ours, by itself or within others, shared, hooked,
frozen. It is changed in place, and its layers stay the objects that optimizers and hooks hold.

What comes back: `model` itself, and a Report with the outcome for each layer by its path, with the reason where a layer
was left alone.

A failure is an error that names the layer and says what to do; then the model is as it was: see rollback.py.

`virtual_batch` is no pass but a context, which lasts for one step.
"""
