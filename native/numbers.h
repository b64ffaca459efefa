// How the numbers of a tensor become those that are computed with, and back.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace batchnorm {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// What is computed in: float32, or float64 for float64.
template <class E>
struct Widened {
  using type = float;
};
template <>
struct Widened<double> {
  using type = double;
};
template <class E>
using Wide = typename Widened<E>::type;

// What many values are summed in: float64, but for those whose results have 8 or 11 digits.
template <class E>
using Sum = std::conditional_t<std::is_same_v<E, float>, double, Wide<E>>;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) { return of_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(f16 x) {
  // Shifted into place, the exponent is 112 too small; a product mends it, subnormals included. What had the largest
  // exponent, inf and nan, must keep the largest.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const float scaled = of_bits(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return of_bits(bits_of(scaled) | special | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

template <class E>
inline E narrow(Wide<E> x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const uint32_t quiet = (bits >> 16) | 0x40u;  // a nan may not be rounded to inf
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}
template <>
inline f16 narrow<f16>(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Below 2⁻¹⁴ the adder rounds: added to 0.5, whose last place is 2⁻²⁴, the smallest subnormal.
  const uint32_t small = bits_of(of_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < (113u << 23) ? small : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and more round to inf
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(half | sign)};
}

}  // namespace
}  // namespace batchnorm
