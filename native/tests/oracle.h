// Batch normalization as its formulas say, in long double, and how far the kernels may be from it.
#pragma once

#include <memory>

#include "tensors.h"

namespace batchnorm::tests {

// A call, its inputs, and the oracle's answers: elements of a tensor in the order of n, c, i.
struct Problem {
  Shape shape;
  Number number;
  Layer layer{};
  bool given = false, residual = false, from_y = false;  // from_y: backward reads what the activation returned
  std::unique_ptr<Block> x{}, r{}, dy{}, weight{}, bias{}, mean{}, m2{};  // null: there is none
  double count = 0;

  int64_t at(int64_t n, int64_t c, int64_t i) const { return (n * shape.channels + c) * shape.inner + i; }
};

struct Answer {
  std::vector<Real> y, dx, dr;                 // of each value
  std::vector<Real> y_scale, dx_scale;         // the size of what they were summed from
  std::vector<Real> mean, m2, dweight, dbias;  // of each channel
  std::vector<Real> std, dweight_scale, dbias_scale;
};

inline Real activated(Activation activation, Real z, Real slope) {
  switch (activation) {
    case Activation::relu: return z <= 0 ? 0 : z;
    case Activation::leaky_relu: return z > 0 ? z : z * slope;
    case Activation::relu6: return z <= 0 ? 0 : z >= 6 ? 6 : z;
    default: return z;
  }
}
inline Real derivative(Activation activation, Real z, Real slope) {
  switch (activation) {
    case Activation::relu: return z <= 0 ? 0 : 1;
    case Activation::leaky_relu: return z > 0 ? 1 : slope;
    case Activation::relu6: return z <= 0 || z >= 6 ? 0 : 1;
    default: return 1;
  }
}

// Clears dy where rounding may decide on which side of an activation's kink a value lies.
inline Answer solve(Problem& p) {
  const Shape& s = p.shape;
  const auto values = static_cast<size_t>(s.count() * s.channels), channels = static_cast<size_t>(s.channels);
  Answer a;
  for (auto* of_values : {&a.y, &a.dx, &a.dr, &a.y_scale, &a.dx_scale}) of_values->resize(values);
  for (auto* of_channels : {&a.mean, &a.m2, &a.dweight, &a.dbias, &a.std, &a.dweight_scale, &a.dbias_scale})
    of_channels->resize(channels);
  const Real slope = p.number == Number::f64 ? Real(p.layer.slope) : Real(static_cast<float>(p.layer.slope));
  const Real count = p.given ? Real(p.count) : Real(s.count());
  for (int64_t c = 0; c < s.channels; c++) {
    const auto each = [&](const auto& f) {
      for (int64_t n = 0; n < s.outer; n++)
        for (int64_t i = 0; i < s.inner; i++) f(n, i, p.at(n, c, i), Real(p.x->get(n, c, i)));
    };
    Real mean = 0, m2 = 0;
    if (p.given) {
      mean = p.mean->get(c);
      m2 = p.m2->get(c);
    } else {
      each([&](int64_t, int64_t, int64_t, Real x) { mean += x; });
      mean /= count;
      each([&](int64_t, int64_t, int64_t, Real x) { m2 += (x - mean) * (x - mean); });
    }
    const Real w = p.weight ? p.weight->get(c) : 1, b = p.bias ? p.bias->get(c) : 0;
    const Real std = std::sqrt(m2 / count + Real(p.layer.eps)), inverse = 1 / std, by = w * inverse;
    Real sum = 0, sum_scale = 0, moved = 0, moved_scale = 0;
    each([&](int64_t n, int64_t i, int64_t k, Real x) {
      const Real r = p.residual ? p.r->get(n, c, i) : 0, z = (x - mean) * by + b + r;
      a.y[k] = activated(p.layer.activation, z, slope);
      a.y_scale[k] = (std::fabs(x - mean) + std) * std::fabs(by) + std::fabs(b) + std::fabs(r);
      const bool kink = p.layer.activation != Activation::none && (std::fabs(z) < 0.02 || std::fabs(z - 6) < 0.05);
      if (kink) p.dy->set(n, c, i, 0);
      const Real g = p.dy->get(n, c, i) * derivative(p.layer.activation, z, slope);
      a.dr[k] = g;
      sum += g;
      sum_scale += std::fabs(g);
      moved += g * (x - mean) * inverse;
      moved_scale += std::fabs(g) * (std::fabs(x - mean) * inverse + 1);
    });
    each([&](int64_t, int64_t, int64_t k, Real x) {
      const Real normal = (x - mean) * inverse, g = a.dr[k];
      a.dx[k] = p.given ? by * g : by * (g - sum / count - normal * moved / count);
      a.dx_scale[k] = std::fabs(by) * (std::fabs(g) + (p.given ? 0 : (sum_scale + (std::fabs(normal) + 1) * moved_scale) / count));
    });
    a.mean[c] = mean;
    a.m2[c] = m2;
    a.std[c] = std::sqrt(m2 / count);
    a.dbias[c] = sum;
    a.dweight[c] = moved;
    a.dbias_scale[c] = sum_scale;
    a.dweight_scale[c] = moved_scale;
  }
  return a;
}

struct Results {
  std::unique_ptr<Block> y, mean, m2, dx, dr, dweight, dbias;
};

// What to leave out of a call.
struct Without {
  bool y = false, dx = false, dr = false, dweight = false, dbias = false;
};

struct Places {
  Layout layout = Layout::dense;
  int offset = 0;
};
struct Plan {
  int threads = 1;
  Places y, dx, dr;
  Number dweight = Number::f32, dbias = Number::f32;
  Without without{};
};

// Both passes. `y`: of an earlier call, where this one is without.
inline Results run(const Problem& p, const Plan& plan, const Block* y = nullptr) {
  Results results;
  const auto block = [&](Places places) { return std::make_unique<Block>(p.number, p.shape, places.layout, places.offset); };
  const auto values = [&](Number number) { return std::make_unique<Block>(number, Shape{1, p.shape.channels, 1}); };
  Layer layer = p.layer;
  layer.shape = p.shape;
  layer.number = p.number;
  layer.threads = plan.threads;
  layer.weight = p.weight ? Values(*p.weight) : Values{};
  layer.bias = p.bias ? Values(*p.bias) : Values{};

  results.mean = values(Number::f64);
  results.m2 = values(Number::f64);
  Moments moments{*results.mean, *results.m2, static_cast<double>(p.shape.count())};
  if (p.given) moments = {*p.mean, *p.m2, p.count};
  results.y = block(plan.y);
  const Tensor residual = p.residual ? Tensor(*p.r) : Tensor{};
  kernels().forward(layer, {*p.x, residual, plan.without.y ? Tensor{} : Tensor(*results.y), moments, p.given});

  results.dx = block(plan.dx);
  results.dr = block(plan.dr);
  results.dweight = values(plan.dweight);
  results.dbias = values(plan.dbias);
  const Block& known = y ? *y : *results.y;
  kernels().backward(layer, {*p.dy, *p.x, p.from_y ? Tensor(known) : Tensor{}, moments, p.given,
                             plan.without.dx ? Tensor{} : Tensor(*results.dx),
                             !p.from_y || plan.without.dr ? Tensor{} : Tensor(*results.dr),
                             plan.without.dweight ? Values{} : Values(*results.dweight),
                             plan.without.dbias ? Values{} : Values(*results.dbias),
                             {}});
  return results;
}

// Relative to what a result was summed from.
struct Tolerance {
  Real result, mean, m2;
};
// A few roundings of the type that sums run in. Those of 16 bits lie on a coarse grid, so that what is lost in a sum of
// deviations from a fine shift is lost in the same direction every time.
inline Tolerance tolerance(Number number) {
  if (number == Number::f64) return {4e-14L, 1e-14L, 4e-14L};
  if (number == Number::f32) return {1e-6L, 6e-7L, 3e-6L};
  return {1e-5L, 1e-5L, 2e-5L};
}

inline bool agree(const Problem& p, const Answer& a, const Results& results, const Tolerance& t) {
  bool good = true;
  const auto near = [&](const char* name, Number number, Real found, Real expected, Real slack, int64_t n, int64_t c, int64_t i) {
    const Real allowed = slack + rounding(number, expected) * (1 + slack);
    if (good && !(std::fabs(found - expected) <= allowed))
      good = check(false, "%s[%ld, %ld, %ld] is %.9Lg, not %.9Lg: off by %.2Lg, allowed %.2Lg", name, n, c, i, found, expected,
                   std::fabs(found - expected), allowed);
  };
  for (int64_t c = 0; c < p.shape.channels; c++) {
    if (!p.given) {
      near("mean", Number::f64, results.mean->get(c), a.mean[c], t.mean * a.std[c], 0, c, 0);
      near("m2", Number::f64, results.m2->get(c), a.m2[c], t.m2 * a.m2[c], 0, c, 0);
    }
    near("dweight", results.dweight->number, results.dweight->get(c), a.dweight[c], t.result * a.dweight_scale[c], 0, c, 0);
    near("dbias", results.dbias->number, results.dbias->get(c), a.dbias[c], t.result * a.dbias_scale[c], 0, c, 0);
    for (int64_t n = 0; n < p.shape.outer; n++)
      for (int64_t i = 0; i < p.shape.inner; i++) {
        const int64_t k = p.at(n, c, i);
        near("y", p.number, results.y->get(n, c, i), a.y[k], t.result * a.y_scale[k], n, c, i);
        near("dx", p.number, results.dx->get(n, c, i), a.dx[k], t.result * a.dx_scale[k], n, c, i);
        if (p.from_y) near("dresidual", p.number, results.dr->get(n, c, i), a.dr[k], 1e-15L, n, c, i);
      }
  }
  return good;
}

}  // namespace batchnorm::tests
