// What Python sees: tensors as addresses with sizes and strides, so that no version of torch is compiled in.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include "kernels.h"

namespace nb = nanobind;
using namespace batchnorm;

namespace {

using Address = uintptr_t;
using Sizes = std::tuple<int64_t, int64_t, int64_t>;
using Strided = std::tuple<Address, int64_t, int64_t>;
using PerChannel = std::tuple<Address, int>;
using Tracked = std::tuple<PerChannel, PerChannel, double, Address>;  // running mean and variance, rate, what counts batches

Shape shape(const Sizes& s) { return {std::get<0>(s), std::get<1>(s), std::get<2>(s)}; }
Tensor tensor(const Strided& t) { return {reinterpret_cast<void*>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)}; }
Values values(const PerChannel& v) { return {reinterpret_cast<void*>(std::get<0>(v)), static_cast<Number>(std::get<1>(v))}; }

Layer layer(const Sizes& sizes, int number, const PerChannel& weight, const PerChannel& bias, double eps, int activation,
            double slope, int threads) {
  return {shape(sizes), static_cast<Number>(number), values(weight), values(bias), eps, static_cast<Activation>(activation),
          slope, threads};
}

// `variance`: m2 is one.
Moments moments(const Layer& layer, const PerChannel& mean, const PerChannel& m2, bool variance) {
  return {values(mean), values(m2), variance ? 1 : static_cast<double>(layer.shape.count())};
}

// False, and nothing done, too where there is no running mean.
bool follow(int64_t channels, double count, const void* mean, const void* m2, const Tracked& tracked) {
  const auto& [running_mean, running_var, rate, batches] = tracked;
  return std::get<0>(running_mean) != 0 &&
         track(channels, count, static_cast<const double*>(mean), static_cast<const double*>(m2), values(running_mean),
               values(running_var), rate, reinterpret_cast<int64_t*>(batches));
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Batch normalization on (outer, channels, inner) views; see native/kernels.h.";
  m.def(
      "forward",
      [](const Sizes& sizes, int number, const Strided& x, const Strided& residual, const Strided& y,
         const PerChannel& weight, const PerChannel& bias, double eps, int activation, double slope,
         const PerChannel& mean, const PerChannel& m2, bool given, int64_t group, const Tracked& tracked,
         int threads) {
        const Layer l = layer(sizes, number, weight, bias, eps, activation, slope, threads);
        const Forward call{tensor(x), tensor(residual), tensor(y), moments(l, mean, m2, given), given};
        nb::gil_scoped_release released;
        group > 0 ? forward(l, call, group) : kernels().forward(l, call);
        return follow(l.shape.channels, call.moments.count, call.moments.mean.data, call.moments.m2.data, tracked);
      },
      nb::arg("sizes"), nb::arg("number"), nb::arg("x"), nb::arg("residual"), nb::arg("y"), nb::arg("weight"),
      nb::arg("bias"), nb::arg("eps"), nb::arg("activation"), nb::arg("slope"), nb::arg("mean"), nb::arg("m2"),
      nb::arg("given"), nb::arg("group"), nb::arg("tracked"), nb::arg("threads"),
      "The moments of x, unless a mean and a variance are given, and y = activation(bn(x) + residual), unless y is null; by groups "
      "of so many outer rows, unless it is 0. Then, without groups, `track` by these moments.");
  m.def(
      "backward",
      [](const Sizes& sizes, int number, const Strided& dy, const Strided& x, const Strided& y,
         const PerChannel& weight, const PerChannel& bias, double eps, int activation, double slope,
         const PerChannel& mean, const PerChannel& m2, bool given, const Strided& dx, const Strided& dresidual,
         const PerChannel& dweight, const PerChannel& dbias, const std::tuple<Address, Address>& averages, int64_t group,
         int threads) {
        const Layer l = layer(sizes, number, weight, bias, eps, activation, slope, threads);
        const Averages known{reinterpret_cast<const double*>(std::get<0>(averages)),
                             reinterpret_cast<const double*>(std::get<1>(averages))};
        const Backward call{tensor(dy), tensor(x), tensor(y), moments(l, mean, m2, given || known.g != nullptr), given,
                            tensor(dx), tensor(dresidual), values(dweight), values(dbias), known};
        nb::gil_scoped_release released;
        group > 0 ? backward(l, call, group) : kernels().backward(l, call);
      },
      nb::arg("sizes"), nb::arg("number"), nb::arg("dy"), nb::arg("x"), nb::arg("y"), nb::arg("weight"),
      nb::arg("bias"), nb::arg("eps"), nb::arg("activation"), nb::arg("slope"), nb::arg("mean"), nb::arg("m2"),
      nb::arg("given"), nb::arg("dx"), nb::arg("dresidual"), nb::arg("dweight"), nb::arg("dbias"), nb::arg("averages"),
      nb::arg("group"), nb::arg("threads"),
      "The gradients of `forward`; y is read where a residual was added before an activation. With averages of g and of g·x̂, those "
      "of x and residual alone, and mean and m2 are a mean and a variance.");
  m.def(
      "track",
      [](int64_t channels, double count, Address mean, Address m2, const Tracked& tracked) {
        return follow(channels, count, reinterpret_cast<const void*>(mean), reinterpret_cast<const void*>(m2), tracked);
      },
      nb::arg("channels"), nb::arg("count"), nb::arg("mean"), nb::arg("m2"), nb::arg("tracked"),
      "Update the running statistics and count the batch; False, and nothing done, when the moments are not all finite.");
  m.def(
      "merge",
      [](int64_t parts, int64_t channels, Address counts, int64_t count_step, Address means, Address m2s, int64_t step,
         Address mean, Address m2) {
        return merge(parts, channels, reinterpret_cast<const double*>(counts), count_step,
                     reinterpret_cast<const double*>(means), reinterpret_cast<const double*>(m2s), step,
                     reinterpret_cast<double*>(mean), reinterpret_cast<double*>(m2));
      },
      nb::arg("parts"), nb::arg("channels"), nb::arg("counts"), nb::arg("count_step"), nb::arg("means"), nb::arg("m2s"),
      nb::arg("step"), nb::arg("mean"), nb::arg("m2"), "Merge the moments of parts, all float64; return the count of all.");
  m.def("instruction_set", [] { return kernels().name; }, "That of the kernels in use: avx512, avx2 or baseline.");
  m.def(
      "use_instruction_set",
      [](const char* name) {
        if (!choose(name)) throw nb::value_error("no such instruction set on this machine");
      },
      nb::arg("name"), "For tests: use the kernels of another one. ValueError where it cannot run.");
}
