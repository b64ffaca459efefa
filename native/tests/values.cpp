// What is not finite goes through as it does through torch, and the running statistics follow.
#include <functional>
#include <limits>

#include "oracle.h"
#include "suites.h"

namespace batchnorm::tests {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
constexpr double specials[] = {nan, inf, -inf, 0, -1, 1, 6, 7, 5.5, -8};
constexpr Shape shapes_walked[] = {{7, 61, 1}, {5, 3, 67}, {4, 3, 301}};  // by rows, by rows, by planes
constexpr Layout ways[] = {Layout::dense, Layout::spaced};                // the latter by planes in any case

bool alike(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// torch's: relu(z) is nan for nan, and the derivative at nan is the larger side's but for leaky_relu.
double activate(Activation activation, double z) {
  switch (activation) {
    case Activation::relu: return std::isnan(z) ? z : z > 0 ? z : 0;
    case Activation::leaky_relu: return z > 0 ? z : z * 0.25;
    case Activation::relu6: return std::isnan(z) ? z : z > 6 ? 6 : z > 0 ? z : 0;
    default: return z;
  }
}
double through(Activation activation, double z, double dy) {
  switch (activation) {
    case Activation::relu: return z <= 0 ? 0 : dy;
    case Activation::leaky_relu: return z > 0 ? dy : dy * 0.25;
    case Activation::relu6: return z <= 0 || z >= 6 ? 0 : dy;
    default: return dy;
  }
}

Problem evaluation(const Shape& shape, Number number, Layout layout) {
  Problem p{shape, number};
  p.given = true;
  p.count = 1;
  p.layer.slope = 0.25;
  for (auto* block : {&p.x, &p.r, &p.dy}) *block = std::make_unique<Block>(number, shape, layout, 1);
  for (auto* block : {&p.mean, &p.m2}) *block = std::make_unique<Block>(Number::f32, Shape{1, shape.channels, 1});
  p.mean->fill([](auto...) { return 0; });
  p.m2->fill([](auto...) { return 1; });
  return p;
}

// Of y = activation(x + residual) and its gradient, at places that vector loops and their remainders reach.
void activations(const Shape& shape, Number number, Layout layout) {
  Problem p = evaluation(shape, number, layout);
  Chance chance(3);
  for (auto* block : {&p.x, &p.r, &p.dy}) (*block)->fill([&](auto...) { return specials[chance.below(10)]; });
  for (const Activation activation : {Activation::none, Activation::relu, Activation::leaky_relu, Activation::relu6})
    for (const bool residual : {false, true}) {
      p.layer.activation = activation;
      p.residual = residual;
      p.from_y = residual && activation != Activation::none;
      const Results results = run(p, {});
      for (int64_t n = 0; n < shape.outer; n++)
        for (int64_t c = 0; c < shape.channels; c++)
          for (int64_t i = 0; i < shape.inner; i++) {
            const double z = p.x->get(n, c, i) + (residual ? p.r->get(n, c, i) : 0), dy = p.dy->get(n, c, i);
            const double y = results.y->get(n, c, i), dx = results.dx->get(n, c, i);
            const int a = static_cast<int>(activation);
            check(alike(y, activate(activation, z)), "activation %d of %g is %g", a, z, y);
            check(alike(dx, through(activation, z, dy)), "dx of activation %d at %g is %g for a dy of %g", a, z, dx, dy);
            if (p.from_y)
              check(alike(results.dr->get(n, c, i), through(activation, z, dy)), "dresidual of activation %d at %g is %g", a, z,
                    results.dr->get(n, c, i));
          }
    }
}

// In training a value that is not finite makes its channel nan, and no other.
void one_channel(const Shape& shape, Number number, Layout layout) {
  const int64_t last = shape.outer - 1, channel = shape.channels - 2, position = shape.inner - 1;
  for (const double special : {nan, inf, -inf})
    for (const Activation activation : {Activation::none, Activation::relu, Activation::relu6})
      for (const int which : {0, 1, 2}) {
        Problem p = evaluation(shape, number, layout);
        p.given = false;
        p.layer.eps = 1e-5;
        p.layer.activation = activation;
        p.residual = which == 1;
        p.from_y = p.residual && activation != Activation::none;
        Chance chance(4);
        for (auto* block : {&p.x, &p.r, &p.dy}) (*block)->fill([&](auto...) { return chance.normal(); });
        const Results good = run(p, {});
        Block* const spoiled[] = {p.x.get(), p.r.get(), p.dy.get()};
        spoiled[which]->set(last, channel, position, special);
        const Results bad = run(p, {});
        for (int64_t c = 0; c < shape.channels; c++)
          for (int64_t n = 0; n < shape.outer; n++)
            for (int64_t i = 0; i < shape.inner; i++) {
              const double y = bad.y->get(n, c, i), dx = bad.dx->get(n, c, i), before = good.y->get(n, c, i);
              const bool here = c == channel, exactly = here && n == last && i == position;
              if (which == 0)
                check(here ? std::isnan(y) && std::isnan(dx) : y == before, "y is %g and dx %g in channel %ld for %g in x", y, dx, c,
                      special);
              if (which == 1)
                check(alike(y, exactly ? activate(activation, special) : before), "y is %g for a residual of %g", y, special);
              const bool blocked = which == 2 && activation != Activation::none && (before <= 0 || before >= 6);
              if (which == 2 && exactly && !blocked)
                check(!std::isfinite(bad.dbias->get(c)) && !std::isfinite(dx), "dx is %g for a dy of %g", dx, special);
              if (!here) check(dx == good.dx->get(n, c, i), "dx has changed in channel %ld", c);
            }
        for (int64_t c = 0; c < shape.channels; c++)
          check(c == channel || (bad.dbias->get(c) == good.dbias->get(c) && bad.dweight->get(c) == good.dweight->get(c)),
                "sums have changed in channel %ld", c);
      }
}

template <class T>
void running(Number number) {
  subject = std::string("track ") + name_of(number);
  const double huge = number == Number::f32 ? 1e39 : inf;
  const struct {
    double count, mean, m2;
    bool enters;
  } cases[] = {{5, 1.5, 8, true},  {2, -3, 0, true},   {5, nan, 8, false}, {5, 1, inf, false},
               {5, -inf, 8, false}, {1, 1, 0, false}, {5, huge, 8, false}, {2, 1, huge, false}};
  for (const auto& one : cases)
    for (const double rate : {0.0, 0.1, 1.0})
      for (const int64_t place : {0, 1, 16}) {
        double mean[17], m2[17];
        T running_mean[17], running_var[17];
        for (int64_t c = 0; c < 17; c++) {
          mean[c] = static_cast<double>(c);
          m2[c] = static_cast<double>(c + 1);
          running_mean[c] = static_cast<T>(0.5);
          running_var[c] = static_cast<T>(2);
        }
        mean[place] = one.mean;
        m2[place] = one.m2;
        int64_t batches = 7;
        int64_t* const counter = place == 1 ? nullptr : &batches;
        const bool entered = track(17, one.count, mean, m2, {running_mean, number}, {running_var, number}, rate, counter);
        check(batches == 7 + (entered && counter != nullptr), "%ld batches", batches);
        check(entered == one.enters, "moments %g, %g of %g values: %d", one.mean, one.m2, one.count, entered);
        for (int64_t c = 0; c < 17; c++) {
          const double to_mean = 0.5 + rate * (mean[c] - 0.5), to_var = 2 + rate * (m2[c] / (one.count - 1) - 2);
          const double expected_mean = entered ? to_mean : 0.5, expected_var = entered ? to_var : 2;
          const double slack = number == Number::f32 ? 0x1p-24 : 0x1p-51;
          check(std::fabs(running_mean[c] - expected_mean) <= slack * std::fabs(expected_mean) &&
                    std::fabs(running_var[c] - expected_var) <= slack * expected_var,
                "running statistics %g, %g instead of %g, %g", static_cast<double>(running_mean[c]),
                static_cast<double>(running_var[c]), expected_mean, expected_var);
        }
      }
}

}  // namespace

void values() {
  for (const char* name : instruction_sets())
    for (const Number number : every_number)
      for (const Shape& shape : shapes_walked)
        for (const Layout layout : ways) {
          choose(name);
          subject = std::string(name) + " " + name_of(number) + " inner " + std::to_string(shape.inner) +
                    (layout == Layout::dense ? "" : " spaced");
          activations(shape, number, layout);
          one_channel(shape, number, layout);
        }
  running<float>(Number::f32);
  running<double>(Number::f64);
}

}  // namespace batchnorm::tests
