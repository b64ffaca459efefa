// Groups of samples with moments of their own: a call for each, by the kernels in use.
#include "parts.h"

namespace batchnorm {
namespace {

int64_t bytes_of(Number number) {
  switch (number) {
    case Number::f32: return 4;
    case Number::f64: return 8;
    case Number::bf16:
    case Number::f16: return 2;
  }
  return 0;
}

// `t` from a row or value on.
Tensor from(const Tensor& t, int64_t row, Number number) {
  if (t.data == nullptr) return t;
  return {static_cast<char*>(t.data) + row * t.outer_stride * bytes_of(number), t.outer_stride, t.channel_stride};
}
Values from(const Values& v, int64_t value) {
  return {v.data == nullptr ? nullptr : static_cast<char*>(v.data) + value * bytes_of(v.number), v.number};
}

// run(layer, row, value): the layer of a group, its first row, and the first of its (C,) values. The threads share the groups
// where each gets one, or else a group.
template <class F>
void each_group(const Layer& layer, int64_t group, const F& run) {
  const Shape& shape = layer.shape;
  const int64_t groups = max(1, shape.outer / group), team = groups < layer.threads ? 1 : layer.threads;
  parallel_for(groups, team, threads_for(shape, bytes_of(layer.number)), [&](int64_t i) {
    Layer its = layer;
    its.shape.outer = i + 1 < groups ? group : shape.outer - i * group;
    if (team > 1) its.threads = 1;
    run(its, i * group, i * shape.channels);
  });
}

Moments from(const Moments& m, int64_t value, double count) { return {from(m.mean, value), from(m.m2, value), count}; }

}  // namespace

void forward(const Layer& layer, const Forward& call, int64_t group) {
  const auto at = [&](const Tensor& t, int64_t row) { return from(t, row, layer.number); };
  each_group(layer, group, [&](const Layer& its, int64_t row, int64_t value) {
    // what was found of each group before is of its own values
    const double count = call.given && call.moments.count == 1 ? 1 : static_cast<double>(its.shape.count());
    kernels().forward(its, {at(call.x, row), at(call.residual, row), at(call.y, row), from(call.moments, value, count), call.given});
  });
}

void backward(const Layer& layer, const Backward& call, int64_t group) {
  const auto at = [&](const Tensor& t, int64_t row) { return from(t, row, layer.number); };
  const bool known = call.averages.g != nullptr;
  each_group(layer, group, [&](const Layer& its, int64_t row, int64_t value) {
    const double count = call.given || known ? call.moments.count : static_cast<double>(its.shape.count());
    kernels().backward(its, {at(call.dy, row), at(call.x, row), at(call.y, row), from(call.moments, value, count), call.given,
                             at(call.dx, row), at(call.dresidual, row), from(call.dweight, value), from(call.dbias, value),
                             known ? Averages{call.averages.g + value, call.averages.product + value} : Averages{}});
  });
}

}  // namespace batchnorm
