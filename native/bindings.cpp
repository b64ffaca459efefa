// What Python sees: tensors as addresses with sizes and strides, so that no version of torch is compiled in.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <vector>

#include "exchange.h"
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

Exchange exchange;

// How a dense x is walked: contiguous or channels-last, see layout.py.
struct Walk {
  Shape shape;
  int64_t outer_stride, channel_stride;
  bool by_rows;

  Tensor operator()(const View& view) const { return {view.data(), outer_stride, channel_stride}; }
  // Whether `other` has the shape, the dtype and the order of x.
  bool fits(const View& x, const View& other) const {
    if (other.dims() != x.dims() || other.number != x.number) return false;
    for (int dim = 0; dim < x.dims(); dim++)
      if (other.size(dim) != x.size(dim)) return false;
    return by_rows ? other.channels_last() : other.contiguous();
  }
};

std::optional<Walk> walk(const View& x) {
  if (x.dims() < 2) return std::nullopt;
  const int64_t samples = x.size(0), channels = x.size(1);
  int64_t positions = 1;
  for (int dim = 2; dim < x.dims(); dim++) positions *= x.size(dim);
  if (samples * channels * positions == 0) return std::nullopt;
  if (x.contiguous()) return Walk{{samples, channels, positions}, channels * positions, positions, false};
  if (x.channels_last()) return Walk{{samples * positions, channels, 1}, channels, 1, true};
  return std::nullopt;
}

// The (C,) values of an object or, of None, their default. False where they cannot be read.
bool per_channel(nb::handle object, int64_t channels, Values& found) {
  if (object.is_none()) return true;
  View view;
  if (!exchange.view(object.ptr(), view) || !view.per_channel(channels)) return false;
  found = view.values();
  return true;
}

bool halves(nb::handle stats, int64_t channels, double count, Moments& found) {
  View view;
  if (!exchange.view(stats.ptr(), view) || view.number != Number::f64 || view.dims() != 2 || view.size(0) != 2 ||
      view.size(1) != channels || !view.contiguous())
    return false;
  double* first = static_cast<double*>(view.data());
  found = {{first, Number::f64}, {first + channels, Number::f64}, count};
  return true;
}

// A call of dense tensors normalised by their own moments: its count, and whether it entered the running statistics.
std::optional<std::tuple<int64_t, bool>> forward_dense(nb::handle x, nb::handle y, nb::handle weight, nb::handle bias,
                                                       nb::handle stats, nb::handle running_mean, nb::handle running_var,
                                                       nb::handle batches, double rate, double eps, int activation,
                                                       double slope, int threads) {
  View of_x, of_y, mean, var;
  if (!exchange.view(x.ptr(), of_x) || !exchange.view(y.ptr(), of_y)) return std::nullopt;
  const std::optional<Walk> at = walk(of_x);
  if (!at || !at->fits(of_x, of_y)) return std::nullopt;
  const int64_t channels = at->shape.channels;
  Layer l{at->shape, of_x.number, {}, {}, eps, static_cast<Activation>(activation), slope, threads};
  Forward call{(*at)(of_x), {}, (*at)(of_y), {}, false};
  if (!per_channel(weight, channels, l.weight) || !per_channel(bias, channels, l.bias)) return std::nullopt;
  if (!halves(stats, channels, static_cast<double>(at->shape.count()), call.moments)) return std::nullopt;
  const bool tracked = !running_mean.is_none();
  int64_t* counter = nullptr;
  if (tracked) {
    if (!exchange.view(running_mean.ptr(), mean) || !exchange.view(running_var.ptr(), var) ||
        !mean.per_channel(channels) || !var.per_channel(channels) || mean.number != var.number ||
        (mean.number != Number::f32 && mean.number != Number::f64))
      return std::nullopt;
    if (!batches.is_none() && (counter = exchange.counter(batches.ptr())) == nullptr) return std::nullopt;
  }
  nb::gil_scoped_release released;
  kernels().forward(l, call);
  const bool entered =
      tracked && track(channels, call.moments.count, static_cast<const double*>(call.moments.mean.data),
                       static_cast<const double*>(call.moments.m2.data), mean.values(), var.values(), rate, counter);
  return std::tuple(at->shape.count(), entered);
}

// The gradients of `forward_dense`. False, and nothing done, where these are no such tensors.
bool backward_dense(nb::handle dy, nb::handle x, nb::handle weight, nb::handle bias, nb::handle stats, nb::handle dx,
                    nb::handle dweight, nb::handle dbias, double eps, int activation, double slope, int threads) {
  View of_dy, of_x, of_dx;
  if (!exchange.view(x.ptr(), of_x) || !exchange.view(dy.ptr(), of_dy) || !exchange.view(dx.ptr(), of_dx)) return false;
  const std::optional<Walk> at = walk(of_x);
  if (!at || !at->fits(of_x, of_dy) || !at->fits(of_x, of_dx)) return false;
  const int64_t channels = at->shape.channels;
  Layer l{at->shape, of_x.number, {}, {}, eps, static_cast<Activation>(activation), slope, threads};
  Backward call{(*at)(of_dy), (*at)(of_x), {}, {}, false, (*at)(of_dx), {}, {}, {}, {}};
  if (!per_channel(weight, channels, l.weight) || !per_channel(bias, channels, l.bias) ||
      !per_channel(dweight, channels, call.dweight) || !per_channel(dbias, channels, call.dbias) ||
      !halves(stats, channels, static_cast<double>(at->shape.count()), call.moments))
    return false;
  nb::gil_scoped_release released;
  kernels().backward(l, call);
  return true;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Batch normalization on (outer, channels, inner) views; see native/kernels.h.";
  m.def(
      "forward",
      [](const Sizes& sizes, int number, const Strided& x, const Strided& residual, const Strided& y,
         const PerChannel& weight, const PerChannel& bias, double eps, int activation, double slope,
         const PerChannel& mean, const PerChannel& m2, int known, int64_t group, const Tracked& tracked,
         int threads) {
        const Layer l = layer(sizes, number, weight, bias, eps, activation, slope, threads);
        const Forward call{tensor(x), tensor(residual), tensor(y), moments(l, mean, m2, known == 1), known != 0};
        nb::gil_scoped_release released;
        group > 0 ? forward(l, call, group) : kernels().forward(l, call);
        return follow(l.shape.channels, call.moments.count, call.moments.mean.data, call.moments.m2.data, tracked);
      },
      nb::arg("sizes"), nb::arg("number"), nb::arg("x"), nb::arg("residual"), nb::arg("y"), nb::arg("weight"),
      nb::arg("bias"), nb::arg("eps"), nb::arg("activation"), nb::arg("slope"), nb::arg("mean"), nb::arg("m2"),
      nb::arg("known"), nb::arg("group"), nb::arg("tracked"), nb::arg("threads"),
      "The moments of x, unless they are known, 1: a mean and a variance, 2: what an earlier call found of x; and y = "
      "activation(bn(x) + residual), unless y is null; by groups of so many outer rows, unless it is 0. Then, without groups, "
      "`track` by these moments.");
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
      "track_unbiased",
      [](int64_t channels, double count, const PerChannel& mean, const PerChannel& variance, const Tracked& tracked) {
        const auto read = [&](const PerChannel& from, double factor) {
          std::vector<double> found(channels);
          for (int64_t c = 0; c < channels; c++)
            found[c] = factor * (values(from).number == Number::f64 ? static_cast<const double*>(values(from).data)[c]
                                                                    : static_cast<const float*>(values(from).data)[c]);
          return found;
        };
        return follow(channels, count, read(mean, 1).data(), read(variance, count - 1).data(), tracked);
      },
      nb::arg("channels"), nb::arg("count"), nb::arg("mean"), nb::arg("variance"), nb::arg("tracked"),
      "`track` by a mean and an unbiased variance, both float32 or float64.");
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
  m.def(
      "use_exchange",
      [](nb::capsule table) { return exchange.use(static_cast<const ExchangeAPI*>(table.data())); }, nb::arg("table"),
      "Read tensors by DLPack's C exchange API, version 1.3 or later of major version 1; False where `table` is another.");
  m.def("forward_dense", &forward_dense, nb::arg("x"), nb::arg("y"), nb::arg("weight").none(), nb::arg("bias").none(),
        nb::arg("stats"), nb::arg("running_mean").none(), nb::arg("running_var").none(), nb::arg("batches").none(),
        nb::arg("rate"), nb::arg("eps"), nb::arg("activation"), nb::arg("slope"), nb::arg("threads"),
        "`forward` and `track` of tensors that are contiguous or channels-last, by the moments of x, which go to stats, (2, C); the "
        "count, and whether they entered the running statistics. None, and nothing done, where these are no such tensors.");
  m.def("backward_dense", &backward_dense, nb::arg("dy"), nb::arg("x"), nb::arg("weight").none(),
        nb::arg("bias").none(), nb::arg("stats"), nb::arg("dx"), nb::arg("dweight").none(), nb::arg("dbias").none(),
        nb::arg("eps"), nb::arg("activation"), nb::arg("slope"), nb::arg("threads"),
        "`backward` of what forward_dense did; False, and nothing done, where these are no such tensors.");
  m.def("instruction_set", [] { return kernels().name; }, "That of the kernels in use: avx512, avx2 or baseline.");
  m.def(
      "use_instruction_set",
      [](const char* name) {
        if (!choose(name)) throw nb::value_error("no such instruction set on this machine");
      },
      nb::arg("name"), "For tests: use the kernels of another one. ValueError where it cannot run.");
}
