// The innermost loops: what is done to a run of values that lie side by side.
//
// Per-channel values come as `Each`, one for each value of the run, or `Same`, one for all.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "numbers.h"

namespace batchnorm {
namespace {

template <class W>
struct Each {
  const W* values;
  W operator[](int64_t i) const { return values[i]; }
  Each from(int64_t i) const { return {values + i}; }
};
template <class W>
struct Same {
  W value;
  W operator[](int64_t) const { return value; }
  Same from(int64_t) const { return *this; }
};

// y = (x - about)·scale + rest, with about near the mean: scale·x + shift would cancel where the mean is large.
template <class V>
struct Line {
  V about, scale, rest;
  Line from(int64_t i) const { return {about.from(i), scale.from(i), rest.from(i)}; }
};

// An activation of two bends: slope·z below 0, z up to `top`, and that from there. ReLU, the usual one, is known when this is
// compiled; `bent` are the others, and ReLU of numbers that are rarely trained with.
enum class Form { none, relu, bent };

template <class W>
struct Bend {
  W slope, top;
  W of_nan;  // what torch multiplies dy by where z is nan
};

// A nan fails every comparison and must come through, as torch's do; hence the order of the operands.
template <Form form, class W>
inline W activate(W z, const Bend<W>& bend) {
  if constexpr (form == Form::relu) return z <= 0 ? W(0) : z;
  if constexpr (form == Form::bent) return z <= 0 ? (bend.slope == 0 ? W(0) : z * bend.slope) : z >= bend.top ? bend.top : z;
  return z;
}
// dy times the activation's derivative; z is what it was given, or what it returned, which tells as much.
template <Form form, class W>
inline W through(W z, W dy, const Bend<W>& bend) {
  if constexpr (form == Form::relu) return z <= 0 ? W(0) : dy;
  if constexpr (form == Form::bent) {
    const W factor = z <= 0 ? bend.slope : z >= bend.top ? W(0) : z > 0 ? W(1) : bend.of_nan;
    return factor == 0 ? W(0) : dy * factor;
  }
  return dy;
}

constexpr int quarters = 4;

// Whether values are summed in what they are computed in, so that no sum of a few has to come first.
template <class E>
constexpr bool as_wide = std::is_same_v<Wide<E>, Sum<E>>;

template <class E, class W = Wide<E>>
inline W sum(const E* x, int64_t n) {
  W total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; i++) total += widen(x[i]);
  return total;
}
template <class E, class W = Wide<E>>
inline void add(const E* x, int64_t n, W* totals) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) totals[i] += widen(x[i]);
}

// Σ (x - shift) and Σ (x - shift)², of a plane, then of each column. As many values as there are rows are summed in float32,
// of a single row its quarters.
template <int rows, class E, class W>
inline void deviations(const E* x, int64_t stride, int64_t n, Same<W> shift, double* first, double* second) {
  if constexpr (rows == 1 && !as_wide<E>) {
    if (n >= quarters) {
      const int64_t apart = n / quarters;
      deviations<quarters>(x, apart, apart, shift, first, second);
      return deviations<1>(x + quarters * apart, 0, n % quarters, shift, first, second);
    }
  }
  Sum<E> a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
  for (int64_t i = 0; i < n; i++) {
    W some = 0, squares = 0;
    for (int row = 0; row < rows; row++) {
      const W d = widen(x[row * stride + i]) - shift.value;
      if constexpr (as_wide<E>) {
        a += d;
        b += d * d;
      } else {
        some += d;
        squares += d * d;
      }
    }
    if constexpr (!as_wide<E>) {
      a += some;
      b += squares;
    }
  }
  *first += a;
  *second += b;
}
template <int rows, class E, class W>
inline void deviations(const E* x, int64_t stride, int64_t n, Each<W> shift, W* first, W* second) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    W some = as_wide<E> ? first[i] : 0, squares = as_wide<E> ? second[i] : 0;
    for (int row = 0; row < rows; row++) {
      const W d = widen(x[row * stride + i]) - shift[i];
      some += d;
      squares += d * d;
    }
    first[i] = as_wide<E> ? some : first[i] + some;
    second[i] = as_wide<E> ? squares : second[i] + squares;
  }
}

template <Form form, bool residual, class E, class V, class W = Wide<E>>
inline void normalise(E* y, const E* x, const E* r, int64_t n, Line<V> line, Bend<W> bend) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    W z = (widen(x[i]) - line.about[i]) * line.scale[i] + line.rest[i];
    if constexpr (residual) z += widen(r[i]);
    y[i] = narrow<E>(activate<form>(z, bend));
  }
}

// The gradient that came through the activation, whose input z is known from y or computed again.
template <Form form, bool from_y, class E, class V, class W = Wide<E>>
inline W gradient(const E* dy, const E* x, const E* y, int64_t i, const Line<V>& line, const Bend<W>& bend) {
  if constexpr (form == Form::none) return widen(dy[i]);
  if constexpr (from_y) return through<form>(widen(y[i]), widen(dy[i]), bend);
  const W z = (widen(x[i]) - line.about[i]) * line.scale[i] + line.rest[i];
  return through<form>(z, widen(dy[i]), bend);
}

// Σ g and Σ g·(x - about), likewise
template <int rows, Form form, bool from_y, class E, class W>
inline void products(const E* dy, const E* x, const E* y, int64_t stride_of_dy, int64_t stride_of_x,
                     int64_t stride_of_y, int64_t n, Line<Same<W>> line, Bend<W> bend, double* first, double* second) {
  if constexpr (rows == 1 && !as_wide<E>) {
    if (n >= quarters) {
      const int64_t apart = n / quarters, rest = quarters * apart;
      products<quarters, form, from_y>(dy, x, y, apart, apart, apart, apart, line, bend, first, second);
      return products<1, form, from_y>(dy + rest, x + rest, y + rest, 0, 0, 0, n % quarters, line, bend, first, second);
    }
  }
  Sum<E> a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
  for (int64_t i = 0; i < n; i++) {
    W some = 0, moved = 0;
    for (int row = 0; row < rows; row++) {
      const W g = gradient<form, from_y>(dy + row * stride_of_dy, x + row * stride_of_x, y + row * stride_of_y, i, line, bend);
      if constexpr (as_wide<E>) {
        a += g;
        b += g * (widen(x[row * stride_of_x + i]) - line.about[i]);
      } else {
        some += g;
        moved += g * (widen(x[row * stride_of_x + i]) - line.about[i]);
      }
    }
    if constexpr (!as_wide<E>) {
      a += some;
      b += moved;
    }
  }
  *first += a;
  *second += b;
}
template <int rows, Form form, bool from_y, class E, class W>
inline void products(const E* dy, const E* x, const E* y, int64_t stride_of_dy, int64_t stride_of_x,
                     int64_t stride_of_y, int64_t n, Line<Each<W>> line, Bend<W> bend, W* first, W* second) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    W some = as_wide<E> ? first[i] : 0, moved = as_wide<E> ? second[i] : 0;
    for (int row = 0; row < rows; row++) {
      const W g = gradient<form, from_y>(dy + row * stride_of_dy, x + row * stride_of_x, y + row * stride_of_y, i, line, bend);
      some += g;
      moved += g * (widen(x[row * stride_of_x + i]) - line.about[i]);
    }
    first[i] = as_wide<E> ? some : first[i] + some;
    second[i] = as_wide<E> ? moved : second[i] + moved;
  }
}

// dx = of_g·g + of_x·(x - about) + rest; without the last two where the moments are given, and so constants.
template <class V>
struct Slopes {
  V of_g, of_x, rest;
  Slopes from(int64_t i) const { return {of_g.from(i), of_x.from(i), rest.from(i)}; }
};

// With a residual (`from_y`) g is its gradient, and goes to dr.
template <Form form, bool from_y, bool given, class E, class V, class W = Wide<E>>
inline void gradients(E* dx, E* dr, const E* dy, const E* x, const E* y, int64_t n, Line<V> line, Slopes<V> slopes,
                      Bend<W> bend) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const W g = gradient<form, from_y>(dy, x, y, i, line, bend);
    if constexpr (from_y) dr[i] = narrow<E>(g);
    W d = g * slopes.of_g[i];
    if constexpr (!given) d += (widen(x[i]) - line.about[i]) * slopes.of_x[i] + slopes.rest[i];
    dx[i] = narrow<E>(d);
  }
}

}  // namespace
}  // namespace batchnorm
