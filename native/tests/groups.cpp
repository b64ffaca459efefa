// Groups of rows with moments of their own, and gradients whose averages are of other values, against the oracle.
#include "oracle.h"
#include "suites.h"

namespace batchnorm::tests {
namespace {

constexpr Layout layouts[] = {Layout::dense, Layout::dense, Layout::slice, Layout::spaced, Layout::crosswise};

using Owned = std::unique_ptr<Block>;

Owned block(Number number, const Shape& shape, Chance& chance, double middle) {
  auto values = std::make_unique<Block>(number, shape, layouts[chance.below(5)], chance.below(4));
  values->fill([&](auto...) { return middle + chance.normal(); });
  return values;
}
Owned per_channel(const Shape& shape, Number number, Chance& chance, double middle, double spread) {
  auto values = std::make_unique<Block>(number, Shape{1, shape.channels, 1});
  values->fill([&](auto...) { return middle + spread * (chance.uniform() - 0.5); });
  return values;
}

Problem problem(const Shape& shape, Number number, Chance& chance) {
  Problem p{shape, number};
  p.layer.eps = 1e-5;
  p.layer.activation = static_cast<Activation>(chance.below(4));
  p.layer.slope = 0.125;
  p.residual = chance.below(2);
  p.from_y = p.residual && p.layer.activation != Activation::none;
  p.x = block(number, shape, chance, 0.5);
  if (p.residual) p.r = block(number, shape, chance, 0);
  p.dy = block(number, shape, chance, 0);
  if (chance.below(3)) p.weight = per_channel(shape, every_number[chance.below(4)], chance, 1, 2);
  if (chance.below(3)) p.bias = per_channel(shape, every_number[chance.below(4)], chance, 1, 4);
  return p;
}

// Rows `first` to `first + rows` in memory of their own.
Owned rows_of(const Block& whole, int64_t first, int64_t rows) {
  auto part = std::make_unique<Block>(whole.number, Shape{rows, whole.shape.channels, whole.shape.inner});
  part->fill([&](int64_t n, int64_t c, int64_t i) { return whole.get(first + n, c, i); });
  return part;
}
Owned copy_of(const Owned& values) { return values ? rows_of(*values, 0, 1) : nullptr; }

Problem rows_of(const Problem& p, int64_t first, int64_t rows) {
  Problem part{{rows, p.shape.channels, p.shape.inner}, p.number};
  part.layer = p.layer;
  part.given = p.given;
  part.residual = p.residual;
  part.from_y = p.from_y;
  part.count = p.count;
  part.x = rows_of(*p.x, first, rows);
  if (p.residual) part.r = rows_of(*p.r, first, rows);
  part.dy = rows_of(*p.dy, first, rows);
  part.weight = copy_of(p.weight);
  part.bias = copy_of(p.bias);
  return part;
}

// What `solve` cleared in a part, at the kinks, is to be cleared in the whole.
void clear_as(Problem& p, const Problem& part, int64_t first) {
  for (int64_t n = 0; n < part.shape.outer; n++)
    for (int64_t c = 0; c < part.shape.channels; c++)
      for (int64_t i = 0; i < part.shape.inner; i++) p.dy->set(first + n, c, i, part.dy->get(n, c, i));
}

Layer layer_of(const Problem& p, int threads) {
  Layer layer = p.layer;
  layer.shape = p.shape;
  layer.number = p.number;
  layer.threads = threads;
  layer.weight = p.weight ? Values(*p.weight) : Values{};
  layer.bias = p.bias ? Values(*p.bias) : Values{};
  return layer;
}

// The group's row of values of (groups, C).
Owned row_of(const Block& values, int64_t group) { return rows_of(values, group, 1); }

struct Groups {
  Owned y, dx, dr, mean, m2, dweight, dbias;  // the last four are (groups, C)
};

Groups run_groups(const Problem& p, int64_t group, int64_t groups, int threads, Layout layout) {
  Groups r;
  for (Owned* of_values : {&r.y, &r.dx, &r.dr}) *of_values = std::make_unique<Block>(p.number, p.shape, layout);
  for (Owned* of_groups : {&r.mean, &r.m2}) *of_groups = std::make_unique<Block>(Number::f64, Shape{groups, p.shape.channels, 1});
  // of a type that is narrower than those beside it, so that rows of another size are noticed
  r.dweight = std::make_unique<Block>(Number::f32, Shape{groups, p.shape.channels, 1});
  r.dbias = std::make_unique<Block>(Number::f64, Shape{groups, p.shape.channels, 1});
  const Layer layer = layer_of(p, threads);
  const Moments moments{*r.mean, *r.m2, -1};  // each group has a count of its own
  forward(layer, {*p.x, p.residual ? Tensor(*p.r) : Tensor{}, *r.y, moments, false}, group);
  backward(layer, {*p.dy, *p.x, p.from_y ? Tensor(*r.y) : Tensor{}, moments, false, *r.dx,
                   p.from_y ? Tensor(*r.dr) : Tensor{}, *r.dweight, *r.dbias, {}}, group);
  return r;
}

bool same(const Groups& a, const Groups& b) {
  return a.y->same(*b.y) && a.dx->same(*b.dx) && a.dr->same(*b.dr) && a.mean->same(*b.mean) && a.m2->same(*b.m2) &&
         a.dweight->same(*b.dweight) && a.dbias->same(*b.dbias);
}

// The group's part of the results.
Results of_group(const Groups& r, int64_t group, int64_t first, int64_t rows) {
  return {rows_of(*r.y, first, rows), row_of(*r.mean, group), row_of(*r.m2, group), rows_of(*r.dx, first, rows),
          rows_of(*r.dr, first, rows), row_of(*r.dweight, group), row_of(*r.dbias, group)};
}

void say(const char* what, const Problem& p, int64_t group, uint64_t seed) {
  char text[200];
  std::snprintf(text, sizeof text, "%s (%ld, %ld, %ld) by %ld, %s seed %lu activation %d residual %d, %s", what, p.shape.outer,
                p.shape.channels, p.shape.inner, group, name_of(p.number), seed, static_cast<int>(p.layer.activation),
                p.residual, kernels().name);
  subject = text;
}

// Every group is what the oracle says of its rows alone, whatever the number of threads.
void examine(const Shape& shape, int64_t group, Number number, uint64_t seed) {
  Chance chance(seed);
  Problem p = problem(shape, number, chance);
  const int64_t groups = shape.outer < 2 * group ? 1 : shape.outer / group;
  std::vector<Problem> parts;
  std::vector<Answer> answers;
  for (int64_t i = 0; i < groups; i++) {
    const int64_t first = i * group, rows = i == groups - 1 ? shape.outer - first : group;
    parts.push_back(rows_of(p, first, rows));
    answers.push_back(solve(parts.back()));
    clear_as(p, parts.back(), first);
  }
  static const auto sets = instruction_sets();
  const Layout layout = layouts[chance.below(5)];
  for (const char* name : sets) {
    choose(name);
    say("groups", p, group, seed);
    Groups one = run_groups(p, group, groups, 1, layout);
    for (int64_t i = 0; i < groups; i++)
      agree(parts[i], answers[i], of_group(one, i, i * group, parts[i].shape.outer), tolerance(number));
    for (const int threads : {2, 3, 7}) {
      Groups more = run_groups(p, group, groups, threads, layout);
      check(same(one, more), "other results with %d threads", threads);
      for (Owned* block : {&more.y, &more.dx, &more.dr, &more.mean, &more.m2, &more.dweight, &more.dbias})
        check((*block)->kept_within(), "bytes were written that belong to no tensor");
    }
  }
}

// Moments and averages of any values but x: dx = weight/√(variance + eps) · (g - averages.g - x̂·averages.product).
void examine_averages(const Shape& shape, int64_t group, Number number, uint64_t seed) {
  Chance chance(seed);
  Problem p = problem(shape, number, chance);
  const int64_t groups = group == 0 || shape.outer < 2 * group ? 1 : shape.outer / group;
  const Shape of_groups{groups, shape.channels, 1};
  const auto values = [&](double middle, double spread) {
    auto some = std::make_unique<Block>(Number::f64, of_groups);
    some->fill([&](auto...) { return middle + spread * (chance.uniform() - 0.5); });
    return some;
  };
  const Owned mean = values(0.5, 1), variance = values(2, 2), g = values(0, 2), product = values(0, 2);
  std::vector<Problem> parts;
  std::vector<Answer> answers;
  for (int64_t i = 0; i < groups; i++) {
    const int64_t first = i * group, rows = i == groups - 1 ? shape.outer - first : group;
    Problem part = rows_of(p, first, rows);
    part.given = true;
    part.count = 1;
    part.mean = rows_of(*mean, i, 1);
    part.m2 = rows_of(*variance, i, 1);
    answers.push_back(solve(part));
    clear_as(p, part, first);
    parts.push_back(std::move(part));
  }
  static const auto sets = instruction_sets();
  for (const char* name : sets) {
    choose(name);
    say("averages", p, group, seed);
    for (const int threads : {1, 3}) {
      const Layer layer = layer_of(p, threads);
      const Moments moments{*mean, *variance, 1};
      Block y(number, shape), dx(number, shape, Layout::spaced), dr(number, shape);
      const Forward forth{*p.x, p.residual ? Tensor(*p.r) : Tensor{}, y, moments, true};
      const Backward back{*p.dy, *p.x, p.from_y ? Tensor(y) : Tensor{}, moments, false, dx,
                          p.from_y ? Tensor(dr) : Tensor{}, {}, {}, {g->doubles(), product->doubles()}};
      if (group > 0) {
        forward(layer, forth, group);
        backward(layer, back, group);
      } else {
        kernels().forward(layer, forth);
        kernels().backward(layer, back);
      }
      bool good = true;
      const auto near = [&](const char* what, Real found, Real expected, Real slack) {
        const Real allowed = slack + rounding(number, expected) * (1 + slack);
        if (good && !(std::fabs(found - expected) <= allowed))
          good = check(false, "%s is %.9Lg, not %.9Lg, with %d threads", what, found, expected, threads);
      };
      const Real slack = tolerance(number).result;
      for (int64_t part = 0; part < groups; part++) {
        const Problem& its = parts[part];
        for (int64_t n = 0; n < its.shape.outer; n++)
          for (int64_t c = 0; c < shape.channels; c++)
            for (int64_t i = 0; i < shape.inner; i++) {
              const int64_t k = its.at(n, c, i), row = part * group + n;
              const Real inverse = 1 / std::sqrt(Real(its.m2->get(c)) + Real(p.layer.eps));
              const Real by = inverse * (p.weight ? p.weight->get(c) : 1);
              const Real normal = (its.x->get(n, c, i) - Real(its.mean->get(c))) * inverse;
              const Real of_g = g->get(part, c, 0), of_product = product->get(part, c, 0);
              near("y", y.get(row, c, i), answers[part].y[k], slack * answers[part].y_scale[k]);
              const Real size = std::fabs(of_g) + (std::fabs(normal) + 1) * std::fabs(of_product);
              near("dx", dx.get(row, c, i), answers[part].dx[k] - by * (of_g + normal * of_product),
                   slack * (answers[part].dx_scale[k] + std::fabs(by) * size));
              if (p.from_y) near("dresidual", dr.get(row, c, i), answers[part].dr[k], 1e-15L);
            }
      }
      for (Block* block : {&y, &dx, &dr}) check(block->kept_within(), "bytes were written that belong to no tensor");
    }
  }
}

// Of a batch that is cut in two the first part is normalised by the moments of both, and its gradient is the whole batch's
// there: with the averages of both.
void examine_part(const Shape& shape, Number number, uint64_t seed) {
  Chance chance(seed);
  Problem whole = problem(shape, number, chance);
  const Answer answer = solve(whole);
  const Problem part = rows_of(whole, 0, shape.outer / 2);
  const auto average = [&](const std::vector<Real>& sums) {
    auto values = std::make_unique<Block>(Number::f64, Shape{1, shape.channels, 1});
    values->fill([&](int64_t, int64_t c, int64_t) { return static_cast<double>(sums[c] / shape.count()); });
    return values;
  };
  const Owned variance = average(answer.m2), g = average(answer.dbias), product = average(answer.dweight);
  Block mean(Number::f64, Shape{1, shape.channels, 1});
  mean.fill([&](int64_t, int64_t c, int64_t) { return static_cast<double>(answer.mean[c]); });
  static const auto sets = instruction_sets();
  for (const char* name : sets) {
    choose(name);
    say("a part", part, 0, seed);
    const Layer layer = layer_of(part, 2);
    const Moments moments{mean, *variance, 1};
    Block y(number, part.shape), dx(number, part.shape), dr(number, part.shape);
    kernels().forward(layer, {*part.x, part.residual ? Tensor(*part.r) : Tensor{}, y, moments, true});
    kernels().backward(layer, {*part.dy, *part.x, part.from_y ? Tensor(y) : Tensor{}, moments, false, dx,
                               part.from_y ? Tensor(dr) : Tensor{}, {}, {}, {g->doubles(), product->doubles()}});
    bool good = true;
    for (int64_t n = 0; n < part.shape.outer; n++)
      for (int64_t c = 0; c < shape.channels; c++)
        for (int64_t i = 0; i < shape.inner; i++) {
          const int64_t k = whole.at(n, c, i);
          const Real found = dx.get(n, c, i), slack = tolerance(number).result * answer.dx_scale[k];
          if (good && !(std::fabs(found - answer.dx[k]) <= slack + rounding(number, answer.dx[k]) * (1 + slack)))
            good = check(false, "dx[%ld, %ld, %ld] is %.9Lg, not %.9Lg", n, c, i, found, answer.dx[k]);
        }
  }
}

struct Case {
  Shape shape;
  int64_t group;
};
// Groups that are full, a last one that is larger, one group; few groups for many threads, and many; a thread for each group
// only where there is enough to do.
constexpr Case cases[] = {
    {{8, 5, 7}, 2},    {{9, 5, 7}, 2},     {{7, 3, 49}, 3},   {{5, 17, 20}, 4},    {{3, 4, 9}, 5},    {{6, 3, 11}, 6},
    {{5, 6, 300}, 1},  {{40, 33, 1}, 4},   {{67, 100, 1}, 6}, {{31, 64, 1}, 16},   {{300, 3, 2}, 7},  {{11, 64, 196}, 3},
    {{4, 1, 5000}, 2}, {{23, 1, 257}, 10}, {{64, 300, 1}, 8}, {{1000, 17, 1}, 99},
};

}  // namespace

void groups() {
  uint64_t seed = 20000;
  for (const Case& one : cases)
    for (const Number number : every_number)
      for (int trial = 0; trial < (sanitized ? 1 : 2); trial++) {
        seed++;
        examine(one.shape, one.group, number, seed);
        examine_averages(one.shape, trial % 2 == 0 ? one.group : 0, number, seed);
        examine_part(one.shape, number, seed);
      }
}

}  // namespace batchnorm::tests
