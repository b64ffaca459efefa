// The passes over a part: its moments, its output, the sums of its gradient, its gradient.
//
// Accuracy. Sums run over deviations from a shift near the mean: of 4 to 16 values in float32, and these in float64. (In
// float32 equal terms, of which images and counts have many, are all rounded alike: a block of 4096 was off by 1e-5.)
// Blocks are merged by Chan's formula. The shift of a block is the mean of all blocks before it. Should that be far from
// the block's own mean, what cancels in the block is no larger than the spread between the two, which enters m2 as well.
#pragma once

#include "parts.h"
#include "spans.h"
#include "stream.h"

namespace batchnorm {
namespace {

constexpr int64_t block_values = 4096, block_rows = 64;  // about one shift
constexpr int64_t first_values = 1024, first_rows = 8;   // that give the first shift
constexpr int64_t streams_from = 4 << 20;                // bytes of a result that no cache will keep
constexpr int64_t short_run = 512;                       // bytes

template <class E>
const E* at(const Tensor& t, int64_t n, int64_t c) {
  return static_cast<const E*>(t.data) + n * t.outer_stride + c * t.channel_stride;
}
template <class E>
E* at_mutable(const Tensor& t, int64_t n, int64_t c) {
  return static_cast<E*>(t.data) + n * t.outer_stride + c * t.channel_stride;
}

// (C,) values from `channel` on, as float64.
inline void load(const Values& values, int64_t channel, int64_t channels, double otherwise, double* out) {
  const auto each = [&](auto number) {
    const auto* in = static_cast<const decltype(number)*>(values.data) + channel;
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) out[c] = widen(in[c]);
  };
  if (values.data == nullptr) {
    for (int64_t c = 0; c < channels; c++) out[c] = otherwise;
    return;
  }
  switch (values.number) {
    case Number::f32: return each(float());
    case Number::f64: return each(double());
    case Number::bf16: return each(bf16());
    case Number::f16: return each(f16());
  }
}
inline void store(const Values& values, int64_t c, double value) {
  if (values.data == nullptr) return;
  switch (values.number) {
    case Number::f32: static_cast<float*>(values.data)[c] = static_cast<float>(value); break;
    case Number::f64: static_cast<double*>(values.data)[c] = value; break;
    case Number::bf16: static_cast<bf16*>(values.data)[c] = narrow<bf16>(static_cast<float>(value)); break;
    case Number::f16: static_cast<f16*>(values.data)[c] = narrow<f16>(static_cast<float>(value)); break;
  }
}

// f(n, channel, k, length) for each run of values that lie side by side; k is the index of its first accumulator.
template <bool by_rows, class F>
inline void walk(const Part& part, int64_t inner, const F& f) {
  for (int64_t n = part.first_outer; n < part.first_outer + part.outer; n++) {
    if constexpr (by_rows) {
      f(n, part.first_channel, int64_t(0), part.channels * inner);
    } else {
      for (int64_t k = 0; k < part.channels; k++) f(n, part.first_channel + k, k, inner);
    }
  }
}

// Rows are summed several at once, a quarter of the part apart: every accumulator is read and written a quarter as often, and
// the processor's prefetcher sees as many long streams. Rows that lie side by side it does not follow (10 GB/s for 25).
constexpr int64_t turns = 4;
// Steps that a column is summed over before it is added to a total in float64: 16 values in float32.
template <class W>
constexpr int64_t column_steps = sizeof(W) == sizeof(double) ? block_rows / turns : 4;

// f(n, apart, count) for rows n, n + apart, ..., `count` of them, one of each quarter, for some steps of a part; in its last
// steps also for the rows that are left over. Returns how many rows those were.
template <class F>
inline int64_t by_turns(const Part& part, int64_t first_step, int64_t steps, const F& f) {
  const int64_t quarter = part.outer / turns, end = min(first_step + steps, quarter);
  for (int64_t step = first_step; step < end; step++)
    f(part.first_outer + step, quarter, std::integral_constant<int, turns>());
  if (first_step + steps < quarter) return turns * steps;
  for (int64_t n = turns * quarter; n < part.outer; n++)
    f(part.first_outer + n, int64_t(0), std::integral_constant<int, 1>());
  return turns * (end - first_step) + part.outer % turns;
}
inline int64_t steps_of(const Part& part) { return max(1, part.outer / turns); }

// The moments of a part's channels so far; all of them have seen as many values.
struct Seen {
  double count = 0;
  double *mean, *m2;

  // `first` and `second`: Σ (x - shift) and Σ (x - shift)² of `added` more values of each channel. The shift becomes the
  // mean of all.
  template <class W>
  void merge(int64_t channels, double added, const double* first, const double* second, W* shift) {
    const double total = count + added, share = 1 / added, moved = added / total, spread = count * moved;
    const bool fresh = count == 0;
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) {
      const double offset = first[c] * share, within = second[c] - first[c] * offset;
      const double before = fresh ? static_cast<double>(shift[c]) : mean[c];
      const double distance = shift[c] - before + offset;
      mean[c] = before + distance * moved;
      m2[c] = (fresh ? 0 : m2[c]) + (within < 0 ? 0 : within) + distance * distance * spread;
      shift[c] = static_cast<W>(mean[c]);
    }
    count = total;
  }
};

// Adds the columns of each channel to its total, and empties them.
template <class W>
inline void fold(W* columns, int64_t channels, int64_t inner, double* totals) {
  if (inner == 1) {
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) totals[c] += columns[c];
  } else {
    for (int64_t c = 0; c < channels; c++) {
      double total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t k = 0; k < inner; k++) total += columns[c * inner + k];
      totals[c] += total;
    }
  }
  for (int64_t k = 0; k < channels * inner; k++) columns[k] = 0;
}

// Per-channel values as the columns of a part see them: copied to `local` where a channel has several.
template <class W>
inline const W* spread(const W* values, int64_t channels, int64_t inner, W* local) {
  if (inner == 1) return values;
  for (int64_t c = 0; c < channels; c++) {
#pragma omp simd
    for (int64_t k = 0; k < inner; k++) local[c * inner + k] = values[c];
  }
  return local;
}

template <class E, bool by_rows>
void moments(const Shape& shape, const Tensor& x, const Part& part, double* mean, double* m2) {
  using W = Wide<E>;
  const int64_t inner = shape.inner, channels = part.channels, width = by_rows ? channels * inner : 0;
  double first[max_width], second[max_width];
  alignas(64) W shift[max_width], columns[by_rows ? max_width : 1], more[by_rows ? max_width : 1], local[by_rows ? max_width : 1];
  if constexpr (by_rows) {
    const int64_t rows = min(first_rows, part.outer);
    for (int64_t k = 0; k < width; k++) columns[k] = more[k] = 0;
    for (int64_t c = 0; c < channels; c++) first[c] = 0;
    for (int64_t n = 0; n < rows; n++) add(at<E>(x, part.first_outer + n, part.first_channel), width, columns);
    fold(columns, channels, inner, first);
    for (int64_t c = 0; c < channels; c++) shift[c] = static_cast<W>(first[c] / static_cast<double>(rows * inner));
  } else {
    const int64_t values = min(first_values, inner);
    for (int64_t c = 0; c < channels; c++)
      shift[c] = sum(at<E>(x, part.first_outer, part.first_channel + c), values) / static_cast<W>(values);
  }

  Seen seen{0, mean + part.first_channel, m2 + part.first_channel};
  const int64_t steps = max(1, (by_rows ? block_rows : block_values / inner) / turns);
  for (int64_t step = 0; step < steps_of(part); step += steps) {
    int64_t rows = 0;
    for (int64_t c = 0; c < channels; c++) first[c] = second[c] = 0;
    if constexpr (by_rows) {
      const Each<W> shifts{spread(shift, channels, inner, local)};
      for (int64_t some = step; some < min(step + steps, steps_of(part)); some += column_steps<W>) {
        rows += by_turns(part, some, column_steps<W>, [&](int64_t n, int64_t apart, auto count) {
          deviations<count>(at<E>(x, n, part.first_channel), apart * x.outer_stride, width, shifts, columns, more);
        });
        fold(columns, channels, inner, first);
        fold(more, channels, inner, second);
      }
    } else {
      rows = by_turns(part, step, steps, [&](int64_t n, int64_t apart, auto count) {
        for (int64_t c = 0; c < channels; c++)
          for (int64_t i = 0; i < inner; i += block_values)
            deviations<count>(at<E>(x, n, part.first_channel + c) + i, apart * x.outer_stride,
                              min(block_values, inner - i), Same<W>{shift[c]}, first + c, second + c);
      });
    }
    seen.merge(channels, static_cast<double>(rows * inner), first, second, shift);
  }
}

// The chunks of a group, merged in their order (Chan, Golub & LeVeque 1979).
inline void merge_moments(const Shape& shape, const Grid& grid, const Part& group, const Partials& partials,
                          double* mean, double* m2) {
  const int64_t end = group.first_channel + group.channels;
  double count = static_cast<double>(group.outer * shape.inner);
  for (int64_t c = group.first_channel; c < end; c++) {
    mean[c] = partials.first(0)[c];
    m2[c] = partials.second(0)[c];
  }
  for (int64_t chunk = 1; chunk < grid.chunks; chunk++) {
    const double added = static_cast<double>(grid.part(shape, 0, chunk).outer * shape.inner), total = count + added;
    const double moved = added / total, spread = count * moved;
    const double *middle = partials.first(chunk), *squares = partials.second(chunk);
#pragma omp simd
    for (int64_t c = group.first_channel; c < end; c++) {
      const double distance = middle[c] - mean[c];
      mean[c] += distance * moved;
      m2[c] += squares[c] + distance * distance * spread;
    }
    count = total;
  }
}

// What each channel is transformed by, forwards and backwards; one for a call.
template <class W>
class Coefficients {
 public:
  W *about, *scale, *rest;        // y = (x - about)·scale + rest
  W *of_g, *of_x, *rest_of_dx;    // dx = of_g·g + of_x·(x - about) + rest_of_dx
  double *mean, *inverse;         // inverse = 1/√(variance + eps)

  explicit Coefficients(int64_t channels) : doubles_(2 * channels), values_(6 * channels) {
    about = values_.data;
    scale = about + channels;
    rest = scale + channels;
    of_g = rest + channels;
    of_x = of_g + channels;
    rest_of_dx = of_x + channels;
    mean = doubles_.data;
    inverse = mean + channels;
  }

  void set(const Layer& layer, const Moments& moments, int64_t channel, int64_t channels) {
    double weight[max_width], bias[max_width];
    for (int64_t from = channel; from < channel + channels; from += max_width) {
      const int64_t some = min(max_width, channel + channels - from);
      load(layer.weight, from, some, 1, weight);
      load(layer.bias, from, some, 0, bias);
      load(moments.mean, from, some, 0, mean + from);
      load(moments.m2, from, some, 0, inverse + from);
      const double share = 1 / moments.count, eps = layer.eps;
#pragma omp simd
      for (int64_t i = 0; i < some; i++) {
        const int64_t c = from + i;
        inverse[c] = 1 / __builtin_sqrt(inverse[c] * share + eps);
        const double by = weight[i] * inverse[c];
        about[c] = static_cast<W>(mean[c]);
        scale[c] = static_cast<W>(by);
        rest[c] = static_cast<W>(bias[i] + by * (about[c] - mean[c]));  // what was lost in rounding the mean
      }
    }
  }

  // dx = weight·inverse·(g - mean of g - x̂·mean of g·x̂)
  void set_slopes(const Layer& layer, int64_t channel, int64_t channels, const Averages& averages) {
    double weight[max_width];
    for (int64_t from = channel; from < channel + channels; from += max_width) {
      const int64_t some = min(max_width, channel + channels - from);
      load(layer.weight, from, some, 1, weight);
#pragma omp simd
      for (int64_t i = 0; i < some; i++) {
        const int64_t c = from + i;
        const double by = weight[i] * inverse[c], of_deviation = -by * inverse[c] * averages.product[c];
        of_g[c] = static_cast<W>(by);
        of_x[c] = static_cast<W>(of_deviation);
        rest_of_dx[c] = static_cast<W>(of_deviation * (about[c] - mean[c]) - by * averages.g[c]);
      }
    }
  }

 private:
  Scratch<double> doubles_;
  Scratch<W> values_;
};

// The coefficients of a part, as its runs of values see them.
template <bool by_rows, class W>
struct Spread {
  const W* values;
  alignas(64) W local[by_rows ? max_width : 1];

  Spread(const W* per_channel, const Part& part, int64_t inner) {
    values = per_channel + part.first_channel;
    if constexpr (by_rows) values = spread(values, part.channels, inner, local);
  }
  auto operator[](int64_t k) const {
    if constexpr (by_rows) {
      return Each<W>{values + k};
    } else {
      return Same<W>{values[k]};
    }
  }
};

template <bool by_rows, class W>
struct Lines {
  Spread<by_rows, W> about, scale, rest;

  Lines(const Coefficients<W>& all, const Part& part, int64_t inner)
      : about(all.about, part, inner), scale(all.scale, part, inner), rest(all.rest, part, inner) {}
  auto operator[](int64_t k) const { return Line<decltype(about[k])>{about[k], scale[k], rest[k]}; }
};

template <class W>
Bend<W> bend_of(const Layer& layer) {
  const W endless = static_cast<W>(__builtin_nan(""));  // fails every comparison: nothing reaches it, not even inf
  switch (layer.activation) {
    case Activation::leaky_relu: return {static_cast<W>(layer.slope), endless, static_cast<W>(layer.slope)};
    case Activation::relu6: return {0, 6, 1};
    default: return {0, endless, 1};
  }
}

// Whether a result goes around the cache. Of short runs that are no whole lines, too many lines belong to two.
template <bool by_rows>
bool streams(const Shape& shape, const Part& part, int64_t size) {
  const int64_t run = (by_rows ? part.channels : 1) * shape.inner * size;
  return shape.count() * shape.channels * size >= streams_from && (run >= short_run || run % line_bytes == 0);
}

// f(i, count) for a run of results from i on: for each line of the cache that lies in it, whose count is known when this is
// compiled, and for what lies before the first and after the last.
template <class E, class F>
inline void by_lines(const E* results, int64_t length, const F& f) {
  constexpr std::integral_constant<int64_t, line_bytes / sizeof(E)> line;
  const int64_t before = -reinterpret_cast<uintptr_t>(results) % line_bytes / sizeof(E);
  int64_t i = min(before, length);
  if (i > 0) f(int64_t(0), i);
  for (; i + line <= length; i += line) f(i, line);
  if (i < length) f(i, length - i);
}

// Results on their way to memory, at most a line of them, around the cache where it is a whole one.
template <class E>
struct Leaving {
  alignas(line_bytes) E values[line_bytes / sizeof(E)];

  void to(E* results, int64_t count) const {
    if (results == nullptr) return;
    if (count * sizeof(E) == line_bytes && starts_line(results)) return store_line(results, values);
    std::memcpy(results, values, count * sizeof(E));
  }
};

template <class E, bool by_rows, Form form, bool residual>
void normalise(const Layer& layer, const Forward& call, const Coefficients<Wide<E>>& coefficients, const Part& part) {
  using W = Wide<E>;
  const Lines<by_rows, W> lines(coefficients, part, layer.shape.inner);
  const Bend<W> bend = bend_of<W>(layer);
  const bool around = streams<by_rows>(layer.shape, part, sizeof(E));
  walk<by_rows>(part, layer.shape.inner, [&](int64_t n, int64_t c, int64_t k, int64_t length) {
    const auto line = lines[k];
    const E* x = at<E>(call.x, n, c);
    const E* r = residual ? at<E>(call.residual, n, c) : nullptr;
    E* y = at_mutable<E>(call.y, n, c);
    if (!around) return normalise<form, residual>(y, x, r, length, line, bend);
    by_lines(y, length, [&](int64_t i, auto count) {
      Leaving<E> leaving;
      normalise<form, residual>(leaving.values, x + i, residual ? r + i : r, count, line.from(i), bend);
      leaving.to(y + i, count);
    });
  });
  if (around) stores_end();
}

template <class E, bool by_rows, Form form, bool from_y>
void products(const Layer& layer, const Backward& call, const Coefficients<Wide<E>>& coefficients, const Part& part,
              double* sums, double* moved) {
  using W = Wide<E>;
  const int64_t inner = layer.shape.inner, channels = part.channels, width = by_rows ? channels * inner : 0;
  const Lines<by_rows, W> lines(coefficients, part, inner);
  const Bend<W> bend = bend_of<W>(layer);
  double first[max_width], second[max_width];
  alignas(64) W columns[by_rows ? max_width : 1], more[by_rows ? max_width : 1];
  sums += part.first_channel;
  moved += part.first_channel;
  for (int64_t c = 0; c < channels; c++) sums[c] = moved[c] = 0;
  const Tensor& known = from_y ? call.y : call.dy;
  const int64_t steps = by_rows ? column_steps<W> : max(1, block_values / inner / turns);
  for (int64_t k = 0; k < width; k++) columns[k] = more[k] = 0;
  for (int64_t step = 0; step < steps_of(part); step += steps) {
    for (int64_t c = 0; c < channels; c++) first[c] = second[c] = 0;
    by_turns(part, step, steps, [&](int64_t n, int64_t apart, auto count) {
      const int64_t of_dy = apart * call.dy.outer_stride, of_x = apart * call.x.outer_stride,
                    of_known = apart * known.outer_stride;
      for (int64_t k = 0; k < (by_rows ? 1 : channels); k++) {
        const int64_t c = part.first_channel + k;
        const E *dy = at<E>(call.dy, n, c), *x = at<E>(call.x, n, c), *y = at<E>(known, n, c);
        if constexpr (by_rows) {
          products<count, form, from_y>(dy, x, y, of_dy, of_x, of_known, width, lines[0], bend, columns, more);
        } else {
          for (int64_t i = 0; i < inner; i += block_values)
            products<count, form, from_y>(dy + i, x + i, y + i, of_dy, of_x, of_known, min(block_values, inner - i), lines[k],
                                       bend, first + k, second + k);
        }
      }
    });
    if constexpr (by_rows) {
      fold(columns, channels, inner, first);
      fold(more, channels, inner, second);
    }
    for (int64_t c = 0; c < channels; c++) {
      sums[c] += first[c];
      moved[c] += second[c];
    }
  }
  for (int64_t c = 0; c < channels; c++) {  // about the mean itself, not what it was rounded to
    const int64_t channel = part.first_channel + c;
    moved[c] += sums[c] * (coefficients.about[channel] - coefficients.mean[channel]);
  }
}

template <class E, bool by_rows, Form form, bool from_y, bool given>
void gradients(const Layer& layer, const Backward& call, const Coefficients<Wide<E>>& coefficients, const Part& part) {
  using W = Wide<E>;
  const int64_t inner = layer.shape.inner;
  const Lines<by_rows, W> lines(coefficients, part, inner);
  const Spread<by_rows, W> of_g(given ? coefficients.scale : coefficients.of_g, part, inner),
      of_x(coefficients.of_x, part, inner), rest(coefficients.rest_of_dx, part, inner);
  const Bend<W> bend = bend_of<W>(layer);
  const bool dx_wanted = call.dx.data != nullptr, dr_wanted = from_y && call.dresidual.data != nullptr;
  const bool around = streams<by_rows>(layer.shape, part, sizeof(E)) || !dx_wanted || dr_wanted != from_y;  // or what is not wanted leaves nowhere
  walk<by_rows>(part, inner, [&](int64_t n, int64_t c, int64_t k, int64_t length) {
    const Slopes<decltype(of_g[k])> slopes{of_g[k], of_x[k], rest[k]};
    const auto line = lines[k];
    const E *dy = at<E>(call.dy, n, c), *x = at<E>(call.x, n, c), *y = from_y ? at<E>(call.y, n, c) : dy;
    E* dx = dx_wanted ? at_mutable<E>(call.dx, n, c) : nullptr;
    E* dr = dr_wanted ? at_mutable<E>(call.dresidual, n, c) : nullptr;
    if (!around) return gradients<form, from_y, given>(dx, dr, dy, x, y, length, line, slopes, bend);
    by_lines(dx_wanted ? dx : dr, length, [&](int64_t i, auto count) {
      Leaving<E> leaving, leaving_g;
      gradients<form, from_y, given>(leaving.values, leaving_g.values, dy + i, x + i, y + i, count, line.from(i), slopes.from(i),
                                     bend);
      leaving.to(dx_wanted ? dx + i : nullptr, count);
      if constexpr (from_y) leaving_g.to(dr_wanted ? dr + i : nullptr, count);
    });
  });
  if (around) stores_end();
}

}  // namespace
}  // namespace batchnorm
