// Data that are hard on sums, in float32: a mean far from 0, a beginning that says nothing of the rest, no spread at all.
//
// Sanitized code is not vectorised: a block is one long sum, not as many as a vector has lanes, and several times less exact.
#include <functional>

#include "oracle.h"
#include "suites.h"

namespace batchnorm::tests {
namespace {

using Rule = std::function<double(int64_t, int64_t, double)>;  // of a value's place in its channel, of all, and noise

struct Data {
  std::string name;
  Rule value;
  Tolerance allowed;
};

constexpr Real factor = sanitized ? 30 : 1;
const Tolerance usual{1e-6L * factor, 6e-7L * factor, 3e-6L * factor};
const Tolerance misled{1e-5L * factor, 1e-6L * factor, 3e-5L * factor};  // the first shift is far from all that follows

std::vector<Data> every_data() {
  std::vector<Data> all = {
      {"mean 1e4", [](int64_t, int64_t, double noise) { return 1e4 + noise; }, usual},
      {"mean -1e4, spread 0.1", [](int64_t, int64_t, double noise) { return 0.1 * noise - 1e4; }, usual},
      {"ordered", [](int64_t k, int64_t of, double noise) { return 1e4 * double(k) / double(of) + noise; }, usual},
      {"two halves", [](int64_t k, int64_t of, double noise) { return (k < of / 2 ? 1e4 : -1e4) + noise; }, usual},
      {"small", [](int64_t, int64_t, double noise) { return 1e-3 + 1e-6 * noise; }, usual},
  };
  for (const int64_t first : {1, 7, 8, 9, 64, 65, 256, 1024, 1025, 4096})
    all.push_back({std::to_string(first) + " zeros first",
                   [first](int64_t k, int64_t, double noise) { return k < first ? 0 : 1e4 + noise; }, misled});
  return all;
}

void constant(const Shape& shape, Layout layout) {
  for (const double value : {0.0, 1.0, 0.1, 1e4 + 0.1, -3e15, 1e-40}) {
    Problem p{shape, Number::f32};
    p.layer.eps = 1e-5;
    p.x = std::make_unique<Block>(Number::f32, shape, layout);
    p.dy = std::make_unique<Block>(Number::f32, shape, layout);
    p.x->fill([&](auto...) { return value; });
    p.dy->fill([](auto...) { return 1; });
    const Results results = run(p, {});
    for (int64_t c = 0; c < shape.channels; c++) {
      const double x = p.x->get(0, c, 0), mean = results.mean->get(c), m2 = results.m2->get(c), y = results.y->get(0, c, 0);
      check(std::fabs(mean - x) <= 1e-13 * std::fabs(x) && m2 <= 1e-13 * x * x, "mean %.17g and m2 %g of %.17g alone", mean, m2, x);
      check(std::fabs(y) <= 1e-5, "y is %g for %.9g alone", y, x);
    }
  }
}

}  // namespace

void accuracy() {
  const Shape some[] = {{3000, 5, 1}, {300, 3, 7}, {64, 3, 196}, {40, 3, 784}, {5, 2, 20000}, {12000, 20, 1}};
  const std::vector<Data> all = every_data();
  const auto sets = instruction_sets();
  for (const Shape& shape : some) {
    if (sanitized && shape.count() > 5000) continue;
    for (const Layout layout : {Layout::dense, Layout::spaced}) {
      const auto say = [&](const std::string& what) {
        subject = what + " (" + std::to_string(shape.outer) + ", " + std::to_string(shape.channels) + ", " +
                  std::to_string(shape.inner) + (layout == Layout::dense ? ") " : ") spaced ") + kernels().name;
      };
      for (const Data& one : all) {
        Problem p{shape, Number::f32};
        p.layer.eps = 1e-5;
        p.x = std::make_unique<Block>(Number::f32, shape, layout);
        p.dy = std::make_unique<Block>(Number::f32, shape, layout);
        Chance chance(11);
        p.x->fill([&](int64_t n, int64_t, int64_t i) { return one.value(n * shape.inner + i, shape.count(), chance.normal()); });
        p.dy->fill([&](auto...) { return chance.normal(); });
        const Answer answer = solve(p);
        for (const char* name : sets) {
          choose(name);
          say(one.name);
          agree(p, answer, run(p, {}), one.allowed);
        }
      }
      for (const char* name : sets) {
        choose(name);
        say("constant");
        constant(shape, layout);
      }
    }
  }
}

}  // namespace batchnorm::tests
