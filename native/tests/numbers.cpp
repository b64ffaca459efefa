// bfloat16 and float16: all values there and back, and the rounding of millions of floats, as compiled for each
// instruction set: y = (x - 0)·weight + 0.
#include "../numbers.h"

#include "oracle.h"
#include "suites.h"

namespace batchnorm::tests {
namespace {

template <class E>
E rounded(float x) {
  return narrow<E>(x);
}

template <class E>
void directly(const Format& format) {
  for (int bits = 0; bits < 65536; bits++) {
    const E half{static_cast<uint16_t>(bits)};
    const float wide = widen(half);
    const double expected = format.decode(half.bits);
    const bool nan = std::isnan(expected);
    check(nan ? std::isnan(wide) : wide == expected && std::signbit(wide) == std::signbit(expected), "%#x widens to %g", bits, wide);
    const uint16_t back = rounded<E>(wide).bits;
    check(nan ? std::isnan(format.decode(back)) : back == bits, "%#x comes back as %#x", bits, back);
  }
  // All neighbourhoods of a half and of the middle between two, then at random.
  const auto compare = [&](uint32_t bits) {
    const float x = of_bits(bits);
    const uint16_t found = rounded<E>(x).bits, expected = format.encode(x);
    check(std::isnan(x) ? std::isnan(format.decode(found)) : found == expected, "%a rounds to %#x, not %#x", x, found, expected);
  };
  for (uint32_t high = 0; high < 65536 * 8; high++)
    for (const uint32_t low : {0x0u, 0x1u, 0xfffu, 0x1000u, 0x1001u, 0x1fffu}) compare(high << 13 | low);
  Chance chance(1);
  for (int i = 0; i < (sanitized ? 1 << 20 : 1 << 23); i++) compare(chance.bits());
}

void by_kernels(Number number, const Format& format) {
  constexpr int64_t columns = 1031;
  const Shape shape{64, columns, 1};
  for (const Layout layout : {Layout::dense, Layout::spaced}) {  // by rows, by planes
    Problem p{shape, number};
    p.given = true;
    p.count = 1;
    p.x = std::make_unique<Block>(number, shape, layout);
    p.dy = std::make_unique<Block>(number, shape, layout);
    for (auto* block : {&p.weight, &p.mean, &p.m2}) *block = std::make_unique<Block>(Number::f32, Shape{1, columns, 1});
    Chance chance(7);
    p.x->fill([&](int64_t n, int64_t c, int64_t) { return format.decode(static_cast<uint16_t>((n * columns + c) % 65536)); });
    p.dy->fill([&](int64_t n, int64_t c, int64_t) { return format.decode(static_cast<uint16_t>((n * columns + c) % 65536)); });
    // By powers of 2 subnormals come up, ties, and what overflows.
    p.weight->fill([&](int64_t, int64_t c, int64_t) { return c % 3 ? std::ldexp(1.0, -int(c % 13)) : chance.normal() * 8; });
    p.mean->fill([](auto...) { return 0; });
    p.m2->fill([](auto...) { return 1; });
    const Results results = run(p, {});
    for (int64_t n = 0; n < shape.outer; n++)
      for (int64_t c = 0; c < columns; c++) {
        const float wide = static_cast<float>(p.x->get(n, c, 0)), product = wide * static_cast<float>(p.weight->get(c));
        const double expected = format.decode(format.encode(product));
        for (const double found : {results.y->get(n, c, 0), results.dx->get(n, c, 0)})
          check(std::isnan(expected) ? std::isnan(found) : found == expected, "%a times %a is %a, not %a", wide,
                p.weight->get(c), found, expected);
      }
  }
}

}  // namespace

void numbers() {
  subject = "bf16";
  directly<bf16>(bf16_format);
  subject = "f16";
  directly<f16>(f16_format);
  for (const char* name : instruction_sets()) {
    choose(name);
    subject = std::string("bf16 ") + name;
    by_kernels(Number::bf16, bf16_format);
    subject = std::string("f16 ") + name;
    by_kernels(Number::f16, f16_format);
  }
}

}  // namespace batchnorm::tests
