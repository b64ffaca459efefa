// Numbers of every type by arithmetic alone, and tensors whose surroundings are watched.
#pragma once

#include <cstdlib>
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace batchnorm::tests {

// A type of 16 bits: that many of them after the point, and the exponent of the smallest normal number.
struct Format {
  int places, least;

  uint16_t infinity() const { return static_cast<uint16_t>(0x7fffu >> places << places); }
  double decode(uint16_t bits) const {
    const int exponent = (bits & 0x7fff) >> places, fraction = bits & ((1 << places) - 1);
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == infinity() >> places) return fraction ? std::nan("") : sign * HUGE_VAL;
    if (exponent == 0) return sign * std::ldexp(fraction, least - places);
    return sign * std::ldexp((1 << places) + fraction, least + exponent - 1 - places);
  }
  // To nearest, ties to even.
  uint16_t encode(double x) const {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return sign | infinity() | 1;
    if (std::isinf(x)) return sign | infinity();
    const int found = x == 0 ? least : std::ilogb(x), exponent = found < least ? least : found;
    const double units = std::nearbyint(std::ldexp(std::fabs(x), places - exponent));
    const double bits = std::ldexp(exponent - least, places) + units;
    return sign | (bits < infinity() ? static_cast<uint16_t>(bits) : infinity());
  }
};
constexpr Format bf16_format{7, -126}, f16_format{10, -14};

inline int64_t size_of(Number number) { return number == Number::f64 ? 8 : number == Number::f32 ? 4 : 2; }
inline const char* name_of(Number number) {
  const char* names[] = {"f32", "f64", "bf16", "f16"};
  return names[static_cast<int>(number)];
}
constexpr Number every_number[] = {Number::f32, Number::f64, Number::bf16, Number::f16};

inline double read(Number number, const void* from) {
  static const auto table = [](const Format& format) {
    std::vector<double> all(65536);
    for (int bits = 0; bits < 65536; bits++) all[bits] = format.decode(static_cast<uint16_t>(bits));
    return all;
  };
  static const std::vector<double> of_bf16 = table(bf16_format), of_f16 = table(f16_format);
  const auto as = [from](auto value) {
    std::memcpy(&value, from, sizeof value);
    return value;
  };
  switch (number) {
    case Number::f32: return as(float());
    case Number::f64: return as(double());
    case Number::bf16: return of_bf16[as(uint16_t())];
    default: return of_f16[as(uint16_t())];
  }
}
inline void write(Number number, void* to, double value) {
  const auto as = [to](auto narrow) { std::memcpy(to, &narrow, sizeof narrow); };
  switch (number) {
    case Number::f32: return as(static_cast<float>(value));
    case Number::f64: return as(value);
    case Number::bf16: return as(bf16_format.encode(value));
    case Number::f16: return as(f16_format.encode(value));
  }
}
// How far the nearest number of that type may be from `value`.
inline Real rounding(Number number, Real value) {
  const Real size = std::fabs(value);
  switch (number) {
    case Number::f32: return size * 0x1p-24L + 0x1p-150L;
    case Number::f64: return size * 0x1p-53L;
    case Number::bf16: return size * 0x1p-8L * (1 + 0x1p-16L) + 0x1p-134L;
    default: return size * 0x1p-11L * (1 + 0x1p-13L) + 0x1p-25L;
  }
}

enum class Layout : int { dense, slice, spaced, crosswise };

// A tensor in memory of its own. All bytes that are not its values are 0xff, a nan if they are read as a number, and out of
// bounds for the address sanitizer as far as its grain of 8 bytes allows.
class Block {
 public:
  const Shape shape;
  const Number number;

  // `offset`: of the first value from a multiple of 64 bytes, in values
  Block(Number number, const Shape& shape, Layout layout = Layout::dense, int offset = 0) : shape(shape), number(number) {
    const int64_t spaced = layout == Layout::spaced ? 2 : 0, sliced = layout == Layout::slice ? 3 : 0;
    channel_stride_ = shape.inner + spaced;
    outer_stride_ = shape.channels * channel_stride_ + spaced + sliced;
    if (layout == Layout::crosswise) {
      outer_stride_ = shape.inner + 1;
      channel_stride_ = shape.outer * outer_stride_ + 1;
    }
    const int64_t size = size_of(number);
    start_ = margin + offset * size;
    bytes_ = index(shape.outer - 1, shape.channels - 1, shape.inner) * size + start_ + margin;
    if (posix_memalign(reinterpret_cast<void**>(&data_), 64, static_cast<size_t>(bytes_)) != 0) std::abort();
    std::memset(data_, 0xff, static_cast<size_t>(bytes_));
    ASAN_POISON_MEMORY_REGION(data_, bytes_);
    runs([&](char* run, int64_t length) { ASAN_UNPOISON_MEMORY_REGION(run, length); });
  }
  ~Block() {
    ASAN_UNPOISON_MEMORY_REGION(data_, bytes_);
    std::free(data_);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  operator Tensor() const { return {data_ + start_, outer_stride_, channel_stride_}; }
  operator Values() const { return {data_ + start_, number}; }  // of a shape of (1, C, 1)
  double* doubles() const { return reinterpret_cast<double*>(data_ + start_); }

  void* at(int64_t n, int64_t c, int64_t i) const { return data_ + start_ + index(n, c, i) * size_of(number); }
  double get(int64_t n, int64_t c, int64_t i) const { return read(number, at(n, c, i)); }
  double get(int64_t c) const { return get(0, c, 0); }
  void set(int64_t n, int64_t c, int64_t i, double value) { write(number, at(n, c, i), value); }

  // f(n, c, i) for every value
  template <class F>
  void fill(const F& f) {
    for (int64_t n = 0; n < shape.outer; n++)
      for (int64_t c = 0; c < shape.channels; c++)
        for (int64_t i = 0; i < shape.inner; i++) set(n, c, i, f(n, c, i));
  }
  bool same(const Block& other) const {
    bool equal = true;
    for (int64_t n = 0; n < shape.outer; n++)
      for (int64_t c = 0; c < shape.channels; c++)
        equal &= std::memcmp(at(n, c, 0), other.at(n, c, 0), static_cast<size_t>(shape.inner * size_of(number))) == 0;
    return equal;
  }
  // Whether nothing was written but values; says so once, and forgets the values.
  bool kept_within() {
    ASAN_UNPOISON_MEMORY_REGION(data_, bytes_);
    runs([](char* run, int64_t length) { std::memset(run, 0xff, static_cast<size_t>(length)); });
    for (int64_t i = 0; i < bytes_; i++)
      if (data_[i] != '\xff') return false;
    return true;
  }

 private:
  static constexpr int64_t margin = 64;
  char* data_ = nullptr;
  int64_t outer_stride_, channel_stride_, start_, bytes_;

  int64_t index(int64_t n, int64_t c, int64_t i) const { return n * outer_stride_ + c * channel_stride_ + i; }
  template <class F>
  void runs(const F& f) {
    for (int64_t n = 0; n < shape.outer; n++)
      for (int64_t c = 0; c < shape.channels; c++)
        f(static_cast<char*>(at(n, c, 0)), shape.inner * size_of(number));
  }
};

// Those that this machine can run.
inline std::vector<const char*> instruction_sets() {
  std::vector<const char*> found;
  for (const char* name : {"baseline", "avx2", "avx512"})
    if (choose(name)) found.push_back(name);
  return found;
}

}  // namespace batchnorm::tests
