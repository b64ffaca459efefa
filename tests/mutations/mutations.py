"""Deliberate faults, each of which must turn the tests it names red; `python -m tests.mutations` tries them."""

# ruff: noqa: E501  # the old and the new text stay on one line each, as they are in the source

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`old`, which stands exactly once in src/batchnorm/`file`, becomes `new`; `tests` must notice."""

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]


MOMENTS, RUNNING, GRID = ("test_moments.py",), ("test_running_statistics.py",), ("grid",)
FUNCTIONAL, LAYERS, NONFINITE = (
    ("test_functional.py",),
    ("test_layers.py", "test_with_torch.py"),
    ("test_nonfinite.py",),
)
CHECKPOINTING, PAPER = ("test_checkpointing.py",), ("test_paper_properties.py",)

MUTATIONS = [
    # --- moments
    Mutation(
        "Bessel's factor upside down", "moments.py",
        "divisor = self.count - 1 if unbiased", "divisor = self.count + 1 if unbiased",
        "n + 1 for n - 1", RUNNING,
    ),
    Mutation(
        "biased and unbiased swapped", "moments.py",
        "divisor = self.count - 1 if unbiased else self.count", "divisor = self.count if unbiased else self.count - 1",
        "normalising takes the biased variance", PAPER,
    ),
    Mutation(
        "E[x²] - E[x]²", "moments.py",
        "m2 = (centred - channelwise(delta, x)).square().sum(dims)", "m2 = x.square().sum(dims) - count * x.mean(dims).square()",
        "cancels at large means", GRID,
    ),
    Mutation(
        "m2 about the rounded mean", "moments.py",
        "m2 = (centred - channelwise(delta, x)).square()", "m2 = centred.square()",
        "the second correction forgotten", MOMENTS,
    ),
    Mutation(
        "mean rounded to the input's accumulator", "moments.py",
        "return cls(count, shift.to(wide) + delta, m2.to(wide))\n\n    @classmethod", "return cls(count, (shift + delta).to(wide), m2.to(wide))\n\n    @classmethod",
        "a mean of 1e4 in float32 is off by 5e-4", MOMENTS,
    ),
    Mutation(
        "sums in the input's dtype", "moments.py",
        "return _ACCUMULATORS[dtype]", "return dtype",
        "a bfloat16 sum stops at 256", GRID,
    ),
    Mutation(
        "mask ignored by the count", "moments.py",
        "count = mask.sum()", "count = mask.numel() + 0 * mask.sum()",
        "padding counted", MOMENTS,
    ),
    Mutation(
        "product with the mask", "moments.py",
        "return torch.where(mask, values, 0).sum(dims)", "return (values * mask).sum(dims)",
        "a square that overflows under the mask, times 0, is nan", MOMENTS,
    ),
    Mutation(
        "count ignored in merge", "moments.py",
        "((mean - origin) * weight).sum(0) / weight.sum().clamp(min=1)", "(mean - origin).mean(0)",
        "the plain mean of means, wrong for unequal parts", MOMENTS,
    ),
    Mutation(
        "spread between parts ignored", "moments.py",
        "(m2 + spread).sum(0)", "m2.sum(0)",
        "the means of the parts differ", MOMENTS,
    ),
    Mutation(
        "empty parts not masked", "moments.py",
        "mean, m2 = torch.where(weight > 0, mean, 0), torch.where(weight > 0, m2, 0)", "pass",
        "what stands in an empty part leaks", MOMENTS,
    ),
    Mutation(
        "mask not applied before centring", "moments.py",
        "x = torch.where(mask, x.to(accumulator(x.dtype)), 0)", "x = x.to(accumulator(x.dtype))",
        "0 times nan in the gradient is nan", MOMENTS,
    ),
    Mutation(
        "mask of any shape", "moments.py",
        "if mask.dim() != x.dim() or any(", "if False and any(",
        "a missing channel dimension is torch's riddle of an error", MOMENTS,
    ),
    Mutation(
        "one tensor returned twice", "moments.py",
        "return cls(0, empty, empty.clone())", "return cls(0, empty, empty)",
        "an op's two outputs must be two tensors when it is compiled", LAYERS,
    ),
    # --- affine
    Mutation(
        "eps outside the root", "moments.py",
        "torch.rsqrt(variance.to(statistics_dtype(mean.device)) + eps)", "1 / (variance.to(statistics_dtype(mean.device)).sqrt() + eps)",
        "√variance + eps", GRID,
    ),
    Mutation(
        "weight ignored", "moments.py",
        "scale = scale * weight\n", "scale = scale * torch.ones_like(weight)\n",
        "γ has no effect", GRID,
    ),
    Mutation(
        "sign of the bias", "moments.py",
        "-shift if bias is None else bias - shift", "-shift if bias is None else -bias - shift",
        "-β", GRID,
    ),
    Mutation(
        "compose the wrong way round", "moments.py",
        "self.scale * inner.shift + self.shift", "inner.scale * self.shift + inner.shift",
        "inner(self(x))", MOMENTS,
    ),
    Mutation(
        "applied without centring", "moments.py",
        "about = torch.nan_to_num((-self.shift / self.scale).to(dtype), nan=0, posinf=0, neginf=0)", "about = torch.zeros_like(self.shift)",
        "scale·x and shift cancel in evaluation at large means", GRID,
    ),
    Mutation(
        "a decayed weight", "moments.py",
        "about = torch.nan_to_num((-self.shift / self.scale).to(dtype), nan=0, posinf=0, neginf=0)", "about = (-self.shift / self.scale).to(dtype)",
        "-shift/scale beyond float32 makes nan", MOMENTS,
    ),
    # --- kernels
    Mutation(
        "backward without the mean's term", "kernels/reference.py",
        "dy - channelwise(dbias * share, x)", "dy",
        "a term of dx dropped", GRID,
    ),
    Mutation(
        "backward without the variance's term", "kernels/reference.py",
        "torch.addcmul(dy - channelwise(dbias * share, x), standardised, channelwise(dweight * -share, x))", "dy - channelwise(dbias * share, x)",
        "a term of dx dropped", GRID,
    ),
    Mutation(
        "backward without the scale", "kernels/reference.py",
        "return (dx * channelwise(scale.to(dtype), x)).to(x.dtype), dweight, dbias", "return dx.to(x.dtype), dweight, dbias",
        "the last factor of dx dropped", GRID,
    ),
    Mutation(
        "backward without the weight", "kernels/reference.py",
        "standardise.scale if weight is None else standardise.scale * weight", "standardise.scale",
        "γ has no effect on dx", GRID,
    ),
    Mutation(
        "weight's gradient from dy alone", "kernels/reference.py",
        "(dy * standardised).sum(dims)", "dy.sum(dims)",
        "∂/∂γ = Σ dy·x̂", GRID,
    ),
    Mutation(
        "second-order gradient through constants", "kernels/ops.py",
        "if torch.is_grad_enabled():", "if False:",
        "the moments' dependence on x forgotten", FUNCTIONAL,
    ),
    Mutation(
        "one node under torch.func", "kernels/ops.py",
        "if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:", "if False:",
        "vmap and forward mode need the steps", FUNCTIONAL,
    ),
    # --- functional
    Mutation(
        "momentum swapped", "functional.py",
        "running.lerp(batch, rate)", "running.lerp(batch, 1 - rate)",
        "Keras's convention", RUNNING,
    ),
    Mutation(
        "biased running variance", "functional.py",
        "moments.variance(unbiased=True)", "moments.variance()",
        "algorithm 2, line 10 has m/(m - 1)", RUNNING,
    ),
    Mutation(
        "inf and nan enter", "functional.py",
        "entered = (mean + variance).isfinite().all()", "entered = torch.ones((), dtype=torch.bool)",
        "one bad batch ruins the statistics for good", NONFINITE,
    ),
    Mutation(
        "finite in float64 only", "functional.py",
        "entered = (mean + variance).isfinite().all()", "entered = (moments.mean + moments.m2).sum().isfinite()",
        "asked before the values are narrowed", NONFINITE,
    ),
    Mutation(
        "running statistics rebound", "functional.py",
        "running.copy_(torch.where(", "running.set_(torch.where(",
        "whoever holds the storage sees no change", LAYERS,
    ),
    Mutation(
        "residual after the activation", "functional.py",
        "        output = (output + residual).to(output.dtype)\n    function = activation_function(activation)\n    return output if function is None else function(output)",
        "    else:\n        residual = torch.zeros_like(output)\n    function = activation_function(activation)\n    return residual + (output if function is None else function(output))",
        "activation(bn(x)) + residual", GRID,
    ),
    Mutation(
        "residual broadcast", "functional.py",
        "if residual.shape != output.shape:", "if False:",
        "a forgotten dimension passes unseen", FUNCTIONAL,
    ),
    Mutation(
        "statistics move before the activation", "functional.py",
        "    output = activate(output, activation, residual)\n    if moments is not None and running_mean is not None and running_var is not None:\n        track(moments, running_mean, running_var, momentum)  # last: a call that fails moves nothing\n    return output",
        "    if moments is not None and running_mean is not None and running_var is not None:\n        track(moments, running_mean, running_var, momentum)\n    return activate(output, activation, residual)",
        "a refused call has moved them", FUNCTIONAL,
    ),
    Mutation(
        "per-channel arguments broadcast", "functional.py",
        "values.shape != input.shape[1:2]", "values.numel() != input.size(1)",
        "a weight of (1, C, 1, 1) gives an output of another rank", FUNCTIONAL,
    ),
    Mutation(
        "buffers moved by nothing", "functional.py",
        "torch.where(entered, running.lerp(batch, rate), running)", "running.lerp(torch.where(entered, batch, running), rate)",
        "moved towards themselves, -0.0 becomes 0.0 and inf nan", NONFINITE,
    ),
    Mutation(
        "the running mean itself kept for backward", "functional.py",
        "running_mean.clone()", "running_mean",
        "training before the backward pass of an evaluation fails", FUNCTIONAL,
    ),
    Mutation(
        "the residual's dtype leaks", "functional.py",
        "output = (output + residual).to(output.dtype)", "output = output + residual",
        "a bfloat16 network turns float32", FUNCTIONAL,
    ),
    # --- layers
    Mutation(
        "running statistics used in training", "layers.py",
        "by_batch = self.training or (", "by_batch = (",
        "training as evaluation", RUNNING,
    ),
    Mutation(
        "batch statistics used in evaluation", "layers.py",
        "by_batch = self.training or (", "by_batch = True or (",
        "evaluation as training", RUNNING,
    ),
    Mutation(
        "checkpoint guard removed", "layers.py",
        "if moments.count == 0 or _recomputing():", "if moments.count == 0:",
        "a checkpointed batch counts twice", CHECKPOINTING,
    ),
    Mutation(
        "empty batch counted as skipped", "layers.py",
        "if moments.count == 0 or _recomputing():", "if _recomputing():",
        "nothing was wrong with it", NONFINITE,
    ),
    Mutation(
        "cumulative average off by one", "layers.py",
        "1 / (self.num_batches_tracked + 1)", "1 / (self.num_batches_tracked + 2)",
        "the first batch's weight is 1", RUNNING,
    ),
    Mutation(
        "cumulative average in float32", "layers.py",
        "(self.num_batches_tracked + 1).to(mean.dtype)", "(self.num_batches_tracked + 1)",
        "1/3 is wrong by 1e-8", RUNNING,
    ),
    Mutation(
        "bad batches counted as tracked", "layers.py",
        "self.num_batches_tracked.add_(entered)", "self.num_batches_tracked.add_(1)",
        "disturbs the cumulative average", NONFINITE,
    ),
    Mutation(
        "a warning each time", "layers.py",
        "if torch.compiler.is_compiling() or self._warned_of_skipped or skipped.is_meta:", "if torch.compiler.is_compiling() or skipped.is_meta:",
        "a hundred equal lines", NONFINITE,
    ),
    Mutation(
        "no warning with a change of mode", "layers.py",
        "            self._warn_of_skipped(self.num_batches_skipped)\n", "            pass\n",
        "compiled code never warns", NONFINITE,
    ),
    Mutation(
        "compiled code reads whether it was warned", "layers.py",
        "if torch.compiler.is_compiling() or self._warned_of_skipped or", "if self._warned_of_skipped or torch.compiler.is_compiling() or",
        "compiled again after the warning", NONFINITE,
    ),
    Mutation(
        "the value that nobody knows asked for", "layers.py",
        "except RuntimeError:", "except ZeroDivisionError:",
        "vmap, fake tensors and tracers refuse bool()", FUNCTIONAL,
    ),
    Mutation(
        "counter not reset on load", "layers.py",
        """if f"{prefix}running_mean" in state_dict:""", "if False:",
        "it speaks of the run before", NONFINITE,
    ),
    Mutation(
        "counter reset by loading anything", "layers.py",
        """if f"{prefix}running_mean" in state_dict:""", "if True:",
        "the statistics are still those of the run", NONFINITE,
    ),
    Mutation(
        "counter left on meta", "layers.py",
        "if skipped.device != self.running_mean.device:", "if False:",
        "load_state_dict(assign=True) brings everything but the counter", LAYERS,
    ),
    Mutation(
        "counter materialised with what memory held", "layers.py",
        "if skipped is not None and skipped.is_meta:", "if False:",
        "to_empty and skip_init", LAYERS,
    ),
    Mutation(
        "an average without a count", "layers.py",
        "rate = 0.0  # as torch", "rate = 1.0  # as torch",
        "num_batches_tracked = None with momentum=None", LAYERS,
    ),
    Mutation(
        "evaluation with half of the statistics", "layers.py",
        "(self.running_mean is None and self.running_var is None)", "(self.running_mean is None)",
        "torch's error is another one", LAYERS,
    ),
    Mutation(
        "a traced residual not seen", "layers.py",
        "for value in (input, residual):", "for value in (input,):",
        "torch.fx walks into the layer", LAYERS,
    ),
    Mutation(
        "float64 statistics narrowed", "layers.py",
        "return torch.float64 if dtype == torch.float64 else torch.float32", "return torch.float32",
        "a float64 layer is compared to 1e-9", LAYERS,
    ),
    Mutation(
        "statistics stored in float8", "layers.py",
        "return torch.float64 if dtype == torch.float64 else torch.float32", "return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype",
        "lost for good when the layer is converted back", LAYERS,
    ),
    Mutation(
        "statistics follow .half()", "layers.py",
        "if values is not None and after is not None and after.dtype != _wide(after.dtype):", "if False:",
        "in bfloat16 they stop moving", LAYERS,
    ),
    Mutation(
        "statistics rounded on the way through .half()", "layers.py",
        "self._buffers[name] = values.to(after.device, _wide(after.dtype))", "self._buffers[name] = after.to(_wide(after.dtype))",
        "float32 again, but with a half type's digits", LAYERS,
    ),
    Mutation(
        "assigned checkpoints not widened", "layers.py",
        "        self._widen_statistics()  # load_state_dict", "        # load_state_dict",
        "the buffers become the checkpoint's bfloat16", LAYERS,
    ),
    # --- the package
    Mutation(
        "no list of public names", "__init__.py",
        "__all__ = [*_HOME]", "__all_names__ = [*_HOME]",
        "from batchnorm import * gives import_module instead", ("test_public_names.py",),
    ),
]  # fmt: skip
