// Shapes, numbers, layouts and arguments against the oracle, for every instruction set and several numbers of threads.
#include <initializer_list>

#include "oracle.h"
#include "suites.h"

namespace batchnorm::tests {
namespace {

constexpr Layout layouts[] = {Layout::dense, Layout::dense, Layout::slice, Layout::spaced, Layout::crosswise};

Places places(Chance& chance, bool dense) {
  return {dense ? chance.below(3) == 0 ? Layout::slice : Layout::dense : layouts[chance.below(5)], chance.below(4)};
}

std::unique_ptr<Block> per_channel(int64_t channels, Number number, double middle, double spread, Chance& chance) {
  auto values = std::make_unique<Block>(number, Shape{1, channels, 1}, Layout::dense, chance.below(4));
  values->fill([&](auto...) { return middle + spread * (chance.uniform() - 0.5); });
  return values;
}

Problem problem(Shape shape, Number number, Chance& chance, bool dense) {
  Problem p{shape, number};
  p.layer.eps = 1e-5;
  p.layer.activation = static_cast<Activation>(chance.below(4));
  p.layer.slope = 0.125;
  p.given = chance.below(4) == 0;
  p.residual = chance.below(3) == 0;
  p.from_y = p.layer.activation != Activation::none && (p.residual || chance.below(4) == 0);
  const auto block = [&](double middle) {
    const Places where = places(chance, dense);
    auto values = std::make_unique<Block>(number, shape, where.layout, where.offset);
    values->fill([&](auto...) { return middle + chance.normal(); });
    return values;
  };
  p.x = block(0.5);
  if (p.residual) p.r = block(0);
  p.dy = block(0);
  const auto any = [&] { return every_number[chance.below(4)]; };
  // 2 at most, so that a y of 6 comes up
  if (chance.below(4)) p.weight = per_channel(shape.channels, any(), 1, 2, chance);
  if (chance.below(4)) p.bias = per_channel(shape.channels, any(), 1, 4, chance);
  if (p.given) {
    p.mean = per_channel(shape.channels, any(), 0.5, 1, chance);
    p.m2 = per_channel(shape.channels, any(), 6, 4, chance);
    p.count = chance.below(2) ? 1 : 4;
  }
  return p;
}

bool same(const Problem& p, const Results& a, const Results& b, const Without& without, const std::string& why) {
  bool good = p.given || check(a.mean->same(*b.mean) && a.m2->same(*b.m2), "other moments %s", why.c_str());
  const auto equal = [&](const char* name, const Block& one, const Block& other, bool absent) {
    if (!absent) good &= check(one.same(other), "another %s %s", name, why.c_str());
  };
  equal("y", *a.y, *b.y, without.y);
  equal("dx", *a.dx, *b.dx, without.dx);
  if (p.from_y) equal("dresidual", *a.dr, *b.dr, without.dr);
  equal("dweight", *a.dweight, *b.dweight, without.dweight);
  equal("dbias", *a.dbias, *b.dbias, without.dbias);
  return good;
}

void watch(Results& results) {
  for (Block* block : {results.y.get(), results.mean.get(), results.m2.get(), results.dx.get(), results.dr.get(),
                       results.dweight.get(), results.dbias.get()})
    check(block->kept_within(), "bytes were written that belong to no tensor");
}

// `threads`: as many runs, which must say the same.
void examine(const Shape& shape, Number number, uint64_t seed, bool dense, std::initializer_list<int> threads) {
  Chance chance(seed);
  Problem p = problem(shape, number, chance, dense);
  const Answer answer = solve(p);
  Plan plan;
  for (Places* where : {&plan.y, &plan.dx, &plan.dr}) *where = places(chance, dense);
  plan.dweight = every_number[chance.below(4)];
  plan.dbias = every_number[chance.below(4)];
  static const auto sets = instruction_sets();
  for (const char* name : sets) {
    choose(name);
    char text[200];
    std::snprintf(text, sizeof text, "(%ld, %ld, %ld) %s seed %lu dense %d activation %d residual %d given %d from_y %d, %s",
                  shape.outer, shape.channels, shape.inner, name_of(number), seed, dense,
                  static_cast<int>(p.layer.activation), p.residual, p.given, p.from_y, name);
    subject = text;
    plan.threads = 1;
    Results one = run(p, plan);
    agree(p, answer, one, tolerance(number));
    for (const int n : threads) {
      plan.threads = n;
      Results more = run(p, plan);
      same(p, one, more, {}, "with " + std::to_string(n) + " threads");
      watch(more);
    }
    watch(one);
  }
}

constexpr int64_t inners[] = {1, 2, 7, 49, 196, 256, 257, 784, 5000};
constexpr int64_t outers[] = {1, 2, 3, 4, 5, 31, 67};
constexpr int64_t channel_counts[] = {1, 3, 17, 64, 100, 2049, 2500};

}  // namespace

void shapes() {
  constexpr int64_t most = sanitized ? 20000 : 120000;
  uint64_t seed = 0;
  for (const int64_t inner : inners)
    for (const int64_t outer : outers)
      for (const int64_t channels : channel_counts)
        for (const Number number : every_number) {
          seed++;
          if (inner * outer * channels > most) continue;
          static constexpr int several[] = {2, 3, 5};
          examine({outer, channels, inner}, number, seed, seed % 2, {several[seed % 3]});
        }
}

// Results that go around the cache, parts that are cut along `outer`, more channels than a part may have.
void large() {
  struct Large {
    Shape shape;
    bool dense;
  };
  const Large all[] = {
      {{31, 64, 784}, true},  {{5, 17, 2500}, false}, {{67, 100, 196}, false}, {{67, 3, 5000}, true},
      {{5, 2500, 49}, true},  {{4, 2049, 257}, false}, {{5, 2500, 7}, true},   {{31, 2049, 1}, true},
      {{1000, 64, 1}, true},  {{2100, 513, 1}, true}, {{9000, 17, 1}, true},   {{300, 100, 2}, false},
      {{70000, 1, 1}, true},  {{2, 1, 300000}, true},
  };
  uint64_t seed = 5000;
  for (const Large& one : all)
    for (const Number number : every_number) {
      seed++;
      if (sanitized && seed % 4 != seed / 4 % 4) continue;  // one number of each
      examine(one.shape, number, seed, one.dense, {2, 5, 16});
    }
}

// Every selection of results: those that are wanted are the same, and nothing else is written.
void selections() {
  static const auto sets = instruction_sets();
  uint64_t seed = 9000;
  for (const Shape& shape : {Shape{5, 17, 7}, Shape{4, 3, 301}, Shape{67, 33, 1}})
    for (const Number number : every_number)
      for (int trial = 0; trial < 6; trial++) {
        Chance chance(seed++);
        const Problem p = problem(shape, number, chance, true);
        choose(sets[seed % sets.size()]);
        const Results whole = run(p, {});
        for (int chosen = 0; chosen < 32; chosen++) {
          Plan plan;
          plan.without = {bool(chosen & 1), bool(chosen & 2), bool(chosen & 4), bool(chosen & 8), bool(chosen & 16)};
          subject = kernels().name + std::string(" ") + name_of(number) + " selection " + std::to_string(chosen) + " given " +
                    std::to_string(p.given) + " from_y " + std::to_string(p.from_y);
          Results part = run(p, plan, whole.y.get());
          same(p, whole, part, plan.without, "for some of the results");
          const Block nothing(number, shape);
          check(!plan.without.y || part.y->same(nothing), "y was written");
          check(!plan.without.dx || part.dx->same(nothing), "dx was written");
          watch(part);
        }
      }
}

}  // namespace batchnorm::tests
