"""Deliberate faults in the arithmetic; others stand beside the tests that catch them, as MUTATIONS of their file."""

# ruff: noqa: E501  # the old and the new text stay on one line each, as they are in the source

from tests.mutations.mutation import Mutation

MOMENTS, RUNNING, GRID = ("test_moments.py",), ("running/test_running_statistics.py",), ("grid",)
FUNCTIONAL, LAYERS, NONFINITE = (
    ("test_functional.py",),
    ("test_layers.py", "test_with_torch.py"),
    ("test_nonfinite.py",),
)
AGREEMENT, DEVICES = ("kernels/test_agreement.py",), ("kernels/test_devices.py",)
GRADIENTS, OPERATORS = ("kernels/test_gradients.py",), ("kernels/test_operators.py",)
CHECKPOINTING, PAPER = ("test_checkpointing.py",), ("test_paper_properties.py",)
GHOST, MASKS, RENORM = (
    ("statistics/test_ghost.py",),
    ("statistics/test_masks.py",),
    ("statistics/test_renorm.py",),
)
RATES, DOMAIN, SYNC = (
    ("running/test_rates.py",),
    ("running/test_domain.py",),
    ("statistics/test_sync.py",),
)
VIRTUAL_BATCH = ("passes/test_virtual_batch.py",)
EACH_ACTIVATION, FREEZE, ADAPT = (
    ("statistics/test_per_activation.py",),
    ("passes/test_freeze.py",),
    ("calibrate/test_adapt.py",),
)
TRAINER = ("training/test_trainer.py",)
RECIPE, EVALUATE = ("training/test_recipe.py",), ("training/test_evaluation.py",)
FIGURE_3, INCEPTION = ("experiments/test_figure_3.py",), ("models/test_inception.py",)

MUTATIONS = [
    # --- moments
    Mutation(
        "Bessel's factor upside down", "moments.py",
        "divisor = self.count - 1 if unbiased", "divisor = self.count + 1 if unbiased",
        "n + 1 for n - 1", RUNNING, "reference",
    ),
    Mutation(
        "biased and unbiased swapped", "moments.py",
        "divisor = self.count - 1 if unbiased else self.count", "divisor = self.count if unbiased else self.count - 1",
        "normalising takes the biased variance", MOMENTS,
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
        "return cls(count, shift.to(wide) + delta, m2.to(wide))", "return cls(count, (shift + delta).to(wide), m2.to(wide))",
        "a mean of 1e4 in float32 is off by 5e-4", MOMENTS,
    ),
    Mutation(
        "sums in the input's dtype", "moments.py",
        "return _ACCUMULATORS[dtype]", "return dtype",
        "a bfloat16 sum stops at 256", GRID,
    ),
    Mutation(
        "mask ignored by the count", "moments.py",
        "> 1 else mask.sum()", "> 1 else mask.numel() + 0 * mask.sum()",
        "padding counted", MOMENTS,
    ),
    Mutation(
        "product with the mask", "moments.py",
        "return torch.where(mask, values, 0).sum(dims)", "return (values * mask).sum(dims)",
        "a square that overflows under the mask, times 0, is nan", MOMENTS,
    ),
    Mutation(
        "count ignored in merge", "moments.py",
        "((mean - origin) * weight).sum(0) / weight.sum(0).clamp(min=1)", "(mean - origin).mean(0)",
        "the plain mean of means, wrong for unequal parts", MOMENTS,
    ),
    Mutation(
        "spread between parts ignored", "moments.py",
        "(m2 + spread).sum(0)", "m2.sum(0)",
        "the means of the parts differ", MOMENTS,
    ),
    Mutation(
        "empty parts not masked", "moments.py",
        "mean, m2 = torch.where(weight > 0, self.mean, 0), torch.where(weight > 0, self.m2, 0)", "mean, m2 = self.mean, self.m2",
        "what stands in an empty part leaks", MOMENTS,
    ),
    Mutation(
        "mask not applied before centring", "moments.py",
        "x = torch.where(mask, x.to(accumulator(x.dtype)), 0)", "x = x.to(accumulator(x.dtype))",
        "0 times nan in the gradient is nan", MOMENTS,
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
        "second-order gradient through constants", "kernels/node.py",
        "if torch.is_grad_enabled() or not torch._C._has_storage(dy):", "if not torch._C._has_storage(dy):",
        "the moments' dependence on x forgotten", FUNCTIONAL,
    ),
    Mutation(
        "one node under torch.func", "kernels/dispatch.py",
        "if transformed():", "if False:",
        "vmap and forward mode need the steps", FUNCTIONAL,
    ),
    Mutation(
        "momentum swapped", "kernels/reference.py",
        "running.lerp(batch, rate)", "running.lerp(batch, 1 - rate)",
        "Keras's convention", RUNNING, "reference",
    ),
    Mutation(
        "biased running variance", "kernels/reference.py",
        "moments.variance(unbiased=True)", "moments.variance()",
        "algorithm 2, line 10 has m/(m - 1)", RUNNING, "reference",
    ),
    Mutation(
        "inf and nan enter", "kernels/reference.py",
        "else:\n        entered = (mean + variance).isfinite().all()", "else:\n        entered = torch.ones((), dtype=torch.bool)",
        "one bad batch ruins the statistics for good", NONFINITE, "reference",
    ),
    Mutation(
        "finite in float64 only", "kernels/reference.py",
        "else:\n        entered = (mean + variance).isfinite().all()", "else:\n        entered = (moments.mean + moments.m2).sum().isfinite()",
        "asked before the values are narrowed", NONFINITE, "reference",
    ),
    Mutation(
        "running statistics rebound", "kernels/reference.py",
        "running.copy_(torch.where(", "running.set_(torch.where(",
        "whoever holds the storage sees no change", LAYERS, "reference",
    ),
    Mutation(
        "residual after the activation", "kernels/reference.py",
        "    if residual is not None:\n        added = output + residual\n        output = added if added.dtype == output.dtype else added.to(output.dtype)  # no node in a graph\n    function = activation_function(activation)\n    return output if function is None else function(output)",
        "    if residual is None:\n        residual = torch.zeros_like(output)\n    function = activation_function(activation)\n    return residual + (output if function is None else function(output))",
        "activation(bn(x)) + residual", GRID,
    ),
    Mutation(
        "buffers moved by nothing", "kernels/reference.py",
        "torch.where(entered, running.lerp(batch, rate), running)", "running.lerp(torch.where(entered, batch, running), rate)",
        "moved towards themselves, -0.0 becomes 0.0 and inf nan", NONFINITE, "reference",
    ),
    Mutation(
        "the running mean itself kept for backward", "kernels/reference.py",
        "mean.detach().clone(), variance.detach()", "mean.detach(), variance.detach()",
        "training before the backward pass of an evaluation fails", FUNCTIONAL, "reference",
    ),
    Mutation(
        "the residual's dtype leaks", "kernels/reference.py",
        "output = added if added.dtype == output.dtype else added.to(output.dtype)", "output = added",
        "a bfloat16 network turns float32", FUNCTIONAL,
    ),
    Mutation(
        "bad batches counted as tracked", "kernels/reference.py",
        "batches.add_(entered)", "batches.add_(1)",
        "disturbs the cumulative average", NONFINITE, "reference",
    ),
    # --- kernels: native
    Mutation(
        "momentum swapped on its way to the kernel", "kernels/native.py",
        "batches, float(rate),", "batches, 1 - float(rate),",
        "Keras's convention", RUNNING,
    ),
    Mutation(
        "biased running variance of the kernel", "kernels/native.py",
        "_native.track(mean.numel(), number,", "_native.track(mean.numel(), number + 1,",
        "algorithm 2, line 10 has m/(m - 1)", AGREEMENT,
    ),
    Mutation(
        "channels-last rows a value apart", "kernels/layout.py",
        "(stride, 1)", "(1, 1)",
        "rows overlap", GRID,
    ),
    Mutation(
        "every tensor walked as the first", "kernels/layout.py",
        "if x.stride() == self._stride and not x.is_neg():", "if self._stride is not None and not x.is_neg():",
        "a gradient of other strides is read where it does not lie", GRID,
    ),
    Mutation(
        "any layout taken for dense", "kernels/layout.py",
        "if _runs(x, range(2, x.dim())) == 1 else None", "if True else None",
        "positions that lie apart are read as if they lay side by side", GRID,
    ),
    Mutation(
        "output not copied back", "kernels/native.py",
        "return y if out is y else y.copy_(out)", "return y",
        "in a layout that the kernels cannot write, y is what memory held", GRID,
    ),
    Mutation(
        "gradients not copied back", "kernels/native.py",
        "dx.copy_(out)", "pass",
        "in a layout that the kernels cannot write, dx is what memory held", GRID,
    ),
    Mutation(
        "given variance divided by a count in the sums", "kernels/native.py",
        "*_addresses(known), True,", "*_addresses(known), False,",
        "a variance is not a sum of squares", MASKS,
    ),
    Mutation(
        "given statistics taken for the batch's going backward", "kernels/native.py",
        "*_addresses(statistics), constant,", "*_addresses(statistics), False,",
        "a variance is not a sum of squares, and constants have no gradient", GRID,
    ),
    Mutation(
        "moved behind autograd's back", "kernels/native.py",
        "torch.autograd.graph.increment_version((mean, var) if batches is None else (mean, var, batches))", "pass",
        "a graph that saved the buffers gives a wrong gradient instead of an error", GRADIENTS,
    ),
    Mutation(
        "a sign that memory does not hold", "kernels/layout.py",
        "found = None if x.is_neg() else self._strided(x)", "found = self._strided(x)",
        "torch negates lazily", DEVICES,
    ),
    Mutation(
        "a stretched weight read as it lies", "kernels/native.py",
        "values if values.is_contiguous() and not values.is_neg() else", "values if not values.is_neg() else",
        "every second value of a larger tensor", AGREEMENT,
    ),
    # --- kernels: what autograd and compilers see of them
    Mutation(
        "nothing saved for a residual", "kernels/node.py",
        "if residual is None or call.fused == NOT_FUSED:", "if True:",
        "where the activation was cut is not known", GRID,
    ),
    Mutation(
        "the weight's gradient asked of the bias", "kernels/node.py",
        "dweight if needed[1] else None", "dweight if needed[2] else None",
        "lost where the bias is frozen", FUNCTIONAL,
    ),
    Mutation(
        "the running statistics themselves kept by a node", "kernels/dispatch.py",
        "call.statistics = mean.clone(), variance.clone()", "call.statistics = mean, variance",
        "training before the backward pass of an evaluation changes its gradient", FUNCTIONAL,
    ),
    Mutation(
        "a batch of gradients given to a kernel", "kernels/node.py",
        "torch.is_grad_enabled() or not torch._C._has_storage(dy)", "torch.is_grad_enabled()",
        "under vmap dy has no memory of its own", GRADIENTS,
    ),
    Mutation(
        "a backward pass that nobody sees", "kernels/node.py",
        "elif needs_dispatcher(dy):", "elif False:",
        "a dispatch mode around it sees no operator", OPERATORS,
    ),
    Mutation(
        "second-order gradient of a residual lost", "kernels/backward_graph.py",
        "dy if residual is None and needed[3] else dresidual", "dresidual",
        "without an activation nothing is saved of it", GRADIENTS,
    ),
    Mutation(
        "the operator's residual without a gradient", "kernels/operators.py",
        "dbias, dy if y is None else dresidual)", "dbias, dresidual)",
        "without an activation dy is the gradient", OPERATORS,
    ),
    Mutation(
        "the operator's output for its moments", "kernels/operators.py",
        "call.stats, call.count = stats,", "call.stats, call.count = torch.stack([stats[0], stats[0]]),",
        "the mean taken for m2", LAYERS,
    ),
    Mutation(
        "the running statistics themselves kept by an operator", "kernels/operators.py",
        "(call.fixed[0].clone(), call.fixed[1].clone())", "call.fixed",
        "training before the backward pass of an evaluation fails", GRADIENTS,
    ),
    Mutation(
        "second-order gradient through the operator's constants", "kernels/operators.py",
        "if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():", "if torch._C._are_functorch_transforms_active():",
        "the moments' dependence on x forgotten", GRADIENTS,
    ),
    # --- kernels: which computes
    Mutation(
        "a residual of another dtype fused", "kernels/dispatch.py",
        "residual.dtype != x.dtype or ", "",
        "its bytes are read as x's", FUNCTIONAL,
    ),
    Mutation(
        "a negative slope fused", "kernels/dispatch.py",
        "module.negative_slope >= 0", "True",
        "y's sign does not tell that of its input", AGREEMENT,
    ),
    Mutation(
        "an empty batch given to a kernel", "kernels/dispatch.py",
        "if x.numel() == 0 and not stepwise:", "if False:",
        "a division by zero", FUNCTIONAL,
    ),
    Mutation(
        "torch given the running statistics themselves", "kernels/dispatch.py",
        "        mean, variance = (values.to(dtype, copy=True)", "        mean, variance = (values.to(dtype)",
        "training before the backward pass of an evaluation fails", GRADIENTS,
    ),
    # --- functional
    Mutation(
        "residual broadcast", "functional.py",
        "if residual.shape != input.shape:", "if False:",
        "a forgotten dimension passes unseen", FUNCTIONAL,
    ),
    Mutation(
        "statistics move before the activation", "kernels/dispatch.py",
        "    _check_devices(x, weight, bias, call)\n",
        "    call.updates_inline = call.rate is not None and not (call.stepwise or call.group)\n    _check_devices(x, weight, bias, call)\n",
        "a refused call has moved them", FUNCTIONAL,
    ),
    Mutation(
        "per-channel arguments broadcast", "functional.py",
        "if values.shape != per_channel:", "if values.numel() != per_channel[0]:",
        "a weight of (1, C, 1, 1) gives an output of another rank", FUNCTIONAL,
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
        "and mean is not None and not recomputing():", "and mean is not None:",
        "a checkpointed batch counts twice", CHECKPOINTING,
    ),
    Mutation(
        "empty batch counted as skipped", "functional.py",
        " or (not isinstance(moments.count, Tensor) and moments.count == 0)", "",
        "nothing was wrong with it", NONFINITE,
    ),
    Mutation(
        "cumulative average off by one", "running/buffers.py",
        "1 / (batches + 1)", "1 / (batches + 2)",
        "the first batch's weight is 1", RUNNING,
    ),
    Mutation(
        "cumulative average in float32", "running/buffers.py",
        "1 / (batches + 1).double()", "1 / (batches + 1)",
        "1/3 is wrong by 1e-8", RUNNING,
    ),
    Mutation(
        "the value that nobody knows asked for", "running/tracking.py",
        "except RuntimeError:", "except ZeroDivisionError:",
        "vmap, fake tensors and tracers refuse bool()", FUNCTIONAL,
    ),
    Mutation(
        "counter not reset on load", "running/tracking.py",
        """if f"{prefix}running_mean" in state_dict:""", "if False:",
        "it speaks of the run before", NONFINITE,
    ),
    Mutation(
        "counter reset by loading anything", "running/tracking.py",
        """if f"{prefix}running_mean" in state_dict:""", "if True:",
        "the statistics are still those of the run", NONFINITE,
    ),
    Mutation(
        "counter left on meta", "running/tracking.py",
        "if skipped.device != mean.device:", "if False:",
        "load_state_dict(assign=True) brings everything but the counter", LAYERS,
    ),
    Mutation(
        "counter materialised with what memory held", "running/tracking.py",
        "            if skipped.is_meta:\n", "            if False:\n",
        "to_empty and skip_init", LAYERS,
    ),
    Mutation(
        "an average without a count", "running/buffers.py",
        "return 0.0 if batches is None", "return 1.0 if batches is None",
        "num_batches_tracked = None with momentum=None", LAYERS,
    ),
    Mutation(
        "evaluation with half of the statistics", "layers.py",
        "(mean is None and var is None)", "(mean is None)",
        "torch's error is another one", LAYERS,
    ),
    Mutation(
        "float64 statistics narrowed", "running/buffers.py",
        "return torch.float64 if dtype == torch.float64 else torch.float32", "return torch.float32",
        "a float64 layer is compared to 1e-9", LAYERS,
    ),
    Mutation(
        "statistics stored in float8", "running/buffers.py",
        "return torch.float64 if dtype == torch.float64 else torch.float32", "return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype",
        "lost for good when the layer is converted back", LAYERS,
    ),
    Mutation(
        "statistics follow .half()", "running/buffers.py",
        "        if after.dtype != wide(after.dtype):\n", "        if False:\n",
        "in bfloat16 they stop moving", LAYERS,
    ),
    Mutation(
        "statistics rounded on the way through .half()", "running/buffers.py",
        "module._buffers[name] = values.to(after.device, wide(after.dtype))", "module._buffers[name] = after.to(wide(after.dtype))",
        "float32 again, but with a half type's digits", LAYERS,
    ),
    Mutation(
        "assigned checkpoints not widened", "running/tracking.py",
        "        widen(self)  # load_state_dict", "        # load_state_dict",
        "the buffers become the checkpoint's bfloat16", LAYERS,
    ),
    # --- statistics: masks
    Mutation(
        "padding filled with zeros", "kernels/padding.py",
        "return cls(mask, valid, (mean / valid.clamp(min=1)).to(x.dtype), group)", "return cls(mask, valid, (0 * mean).to(x.dtype), group)",
        "at large means what is taken out of the moments again is all there is", MASKS,
    ),
    Mutation(
        "padding left in m2", "kernels/padding.py",
        "m2 = whole.m2 - distance.square() * (filled * whole.count * share)", "m2 = whole.m2",
        "the filling is rounded, so it has a distance from the mean", MASKS,
    ),
    Mutation(
        "padding counted by the kernels", "kernels/padding.py",
        "Moments(self.valid if self.valid.dim() else int(self.valid), mean", "Moments(whole.count, mean",
        "the variance is of the valid values", MASKS,
    ),
    Mutation(
        "padding a part of the gradient", "kernels/stepwise.py",
        "torch.as_tensor(moments.count).clamp(min=1)", "torch.as_tensor(reference.count(x, call.group)).clamp(min=1)",
        "the means of g and of g·x̂ are of the valid values", MASKS,
    ),
    Mutation(
        "the gradient of the first group alone", "kernels/stepwise.py",
        "own.sum(1) if own.dim() == 3 else own", "own[:, 0] if own.dim() == 3 else own",
        "weight and bias are shared by the groups", MASKS,
    ),
    Mutation(
        "padding comes out normalised", "kernels/dispatch.py",
        "return torch.where(mask, normalise(padding.fill(x), weight, bias, residual, call), 0)", "return normalise(padding.fill(x), weight, bias, residual, call)",
        "what was 0 becomes -mean·scale + bias", MASKS,
    ),
    Mutation(
        "a residual's padding let through", "kernels/dispatch.py",
        "residual = torch.where(mask, residual, 0)", "pass",
        "0 times nan in an activation's gradient is nan", MASKS,
    ),
    # --- statistics: ghost batches
    Mutation(
        "what is left over a group of its own", "kernels/reference.py",
        "torch.sym_max(1, samples // size)", "torch.sym_max(1, -(-samples // size))",
        "a group may have one sample", GHOST,
    ),
    Mutation(
        "spread between ghost batches ignored", "statistics/ghost.py",
        "whole.mean, whole.m2", "whole.mean, of_groups.m2.sum(0)",
        "evaluation is by the variance of the whole batch", GHOST,
    ),
    # --- statistics: renorm
    Mutation(
        "a correction of the wrong sign", "statistics/renorm.py",
        "distance.clamp(-dmax, dmax)", "(-distance).clamp(-dmax, dmax)",
        "away from the running mean", RENORM,
    ),
    Mutation(
        "a correction without a lower limit", "statistics/renorm.py",
        "ratio.clamp(1 / rmax, rmax)", "ratio.clamp(max=rmax)",
        "r lies between 1/rmax and rmax", RENORM,
    ),
    Mutation(
        "a shift that the weight does not scale", "statistics/renorm.py",
        "d if weight is None else weight * d", "d",
        "weight·(x̂·r + d) + bias", RENORM,
    ),
    Mutation(
        "a ramp that goes on", "statistics/renorm.py",
        "(self.end - self.begin)).clamp(0, 1)", "(self.end - self.begin)).clamp(min=0)",
        "beyond the paper's limits", RENORM,
    ),
    # --- statistics: of many processes
    Mutation(
        "every rank counts the same", "statistics/process_group.py",
        "torch.cat([self._head(wanted, mean), own_count, ", "torch.cat([self._head(wanted, mean), own_count.clamp(max=1), ",
        "the plain mean of means, wrong for unequal parts", SYNC,
    ),
    Mutation(
        "a rank's gradient of its own samples", "kernels/stepwise.py",
        "total = own if call.exchange is None else call.exchange.sums(own)", "total = own",
        "the moments are of all ranks, and so is the gradient", SYNC,
    ),
    Mutation(
        "a graph of gradients not summed over the ranks", "statistics/process_group.py",
        "total: Tensor = _Sum.apply(of_rows, ctx.ranks)", "total: Tensor = of_rows",
        "what other ranks did with a rank's moments is forgotten", SYNC,
    ),
    Mutation(
        "ranks never asked whether they are at one layer", "statistics/process_group.py",
        "return found[:, 0].tolist() == [number] * ranks", "return True",
        "two layers of equal width are mixed", SYNC,
    ),
    Mutation(
        "sums never asked whether they are of one layer", "statistics/process_group.py",
        "return found[:2].tolist() == [ranks * number, ranks * number**2]", "return found[0].item() == ranks * number",
        "of four ranks two others may have the same sum", SYNC,
    ),
    Mutation(
        "a rank brings what the others do not expect", "statistics/process_group.py",
        "as_expected = expected == wanted.by", "as_expected = expected == wanted.by or expected is _UNKNOWN",
        "of unequal width it aborts a process", SYNC,
    ),
    # --- statistics: running
    Mutation(
        "debiased by one batch too many", "running/buffers.py",
        "(1 - momentum) ** (batches + 1)", "(1 - momentum) ** (batches + 2)",
        "the first batch's weight is 1", RATES,
    ),
    Mutation(
        "one value moves the running statistics", "layers.py",
        "            call = Call(False, self.__dict__[\"eps\"], self.activation, mean, var, mask=mask)\n", "            call = Call(False, self.eps, self.activation, mean, var, mask=mask)\n            functional.track(functional.Moments(2, mean.double() + 1, var.double()), mean, var, 0.1)\n",
        "it says nothing of a variance", RATES,
    ),
    Mutation(
        "an unknown domain evaluated", "running/tracking.py",
        "if not self._follows_batches():", "if False:",
        "a mean of 0 and a variance of 1 normalise nothing", DOMAIN,
    ),
    Mutation(
        "a position that nobody saw enters", "kernels/reference.py",
        "mean, variance = torch.where(known, mean, running_mean), torch.where(known, variance, running_var)", "known = known | True",
        "its variance is nan, and the others wait for it", EACH_ACTIVATION,
    ),
    # --- passes: freeze, convert_sync, adapt
    Mutation(
        "frozen statistics of the batch", "statistics/population.py",
        "return batch.normalised(training=False)", "return batch.normalised()",
        "a frozen layer trains as it is used", FREEZE,
    ),
    Mutation(
        "prior and samples swapped", "calibrate/adapt.py",
        "samples / (prior + samples)", "prior / (prior + samples)",
        "many samples would be worth little", ADAPT,
    ),
    Mutation(
        "adapted to the last batch", "calibrate/collecting.py",
        "moments if self.moments is None else self.moments.merge(moments)", "moments",
        "the target is all batches merged", ADAPT,
    ),
    Mutation(
        "adapted to a biased variance", "calibrate/collecting.py",
        "moments.variance(unbiased=True)", "moments.variance()",
        "running variances are unbiased", ADAPT,
    ),
    Mutation(
        "a domain's prior its own", "calibrate/adapt.py",
        "running(layer), (layer.running_mean, layer.running_var), (mean, variance)", "running(layer), running(layer), (mean, variance)",
        "a new domain has nothing but the layer's to start from", ADAPT,
    ),
    Mutation(
        "nearly all padding taken out again", "kernels/padding.py",
        "return bool((self.valid * 64 < reference.count(x, self.group)).any())", "return False",
        "what is left has lost digits", MASKS,
    ),
    # --- passes: virtual_batch
    Mutation(
        "gradients of the first part alone", "passes/virtual_batch/micro_batches.py",
        "for call in calls for attached, leaf in call.detached", "for call in calls[:1] for attached, leaf in call.detached",
        "every loss has its say", VIRTUAL_BATCH,
    ),
    Mutation(
        "a part without a mask taken for padding", "passes/virtual_batch/together.py",
        "torch.ones_like(x[:, :1], dtype=torch.bool)", "torch.zeros_like(x[:, :1], dtype=torch.bool)",
        "no mask means that all is valid", VIRTUAL_BATCH,
    ),
    # --- the trainer
    Mutation(
        "L2 on γ and β", "training/optimizer.py",
        '{"params": others, "weight_decay": 0.0}', '{"params": others, "weight_decay": weight_decay}',
        "they are no weights", TRAINER,
    ),
    Mutation(
        "a micro-batch's loss unweighted", "training/trainer.py",
        ' * (len(part_labels) / total)', ' * (micro_weight := 1.0)',
        "the whole batch's loss is a mean over its images", TRAINER,
    ),
    Mutation(
        "rate decays too slowly", "training/recipe.py",
        "DECAY_FACTOR = 6", "DECAY_FACTOR = 5",
        "the paper says 6 times", RECIPE,
    ),
    Mutation(
        "steps counted from another seed's target", "experiments/imagenet/figure_3.py",
        'for c, t in zip(by_name[name], targets, strict=True)]', 'for c, t in zip(by_name[name], reversed(targets), strict=True)]',
        "seed by seed", FIGURE_3,
    ),
    Mutation(
        "ensemble without its last network", "training/evaluation.py",
        "return cls(total / len(networks)", "return cls(total / (len(networks) - 1 or 1)",
        "an arithmetic mean", EVALUATE,
    ),
    Mutation(
        "count_include_pad", "models/inception.py",
        "count_include_pad=False", "count_include_pad=True",
        "padding is no data", INCEPTION,
    ),
    Mutation(
        "4c and 4d as printed", "models/inception.py",
        "pool_proj_4cd: int = 96,", "pool_proj_4cd: int = 128,",
        "128 does not add up", INCEPTION,
    ),
    # --- the package
]  # fmt: skip
