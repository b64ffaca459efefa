// How a tensor is divided among threads and walked through.
//
// Two ways to walk. By rows: all columns (channel, position) of a row at once, an accumulator for each column; for
// channels-last and (N, C), where a column is a channel, and for planes too small to be worth a loop. By planes: the
// `inner` values of a channel in one loop. Either way a part is small enough that its second pass finds it in the cache,
// where the layout allows.
//
// The division depends on the shape alone, never on the number of threads, and parts are merged in their order: that is
// why results are the same bit for bit.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

namespace batchnorm {
namespace {

constexpr int64_t max_width = 2048;  // accumulators of a part: a few arrays of as many floats stay in L1

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t least_groups = 16;  // so that as many threads have something to do
constexpr int64_t most_chunks = 64;

struct Part {
  int64_t chunk;
  int64_t first_channel, channels;
  int64_t first_outer, outer;
};

struct Grid {
  bool by_rows;
  int64_t most_threads;  // that have enough to do
  int64_t channels_per_group, groups;
  int64_t outer_per_chunk, chunks;

  Part part(const Shape& shape, int64_t group, int64_t chunk) const {
    const int64_t c = group * channels_per_group, n = chunk * outer_per_chunk;
    return {chunk, c, min(channels_per_group, shape.channels - c), n, min(outer_per_chunk, shape.outer - n)};
  }
};

constexpr int64_t l2_share = 512 << 10;     // bytes of a part that a second pass may hope to find in L2
constexpr int64_t chunk_bytes = 256 << 10;  // of a part that it will not: long enough for streams

inline int64_t threads_for(const Shape& shape, int64_t bytes) {
  return 1 + shape.outer * shape.channels * shape.inner * bytes / (64 << 10);
}

// `bytes` of a value in all the tensors that are read twice; `dense`: every tensor has its channels side by side.
inline Grid divide(const Shape& shape, bool dense, int64_t bytes) {
  Grid grid;
  const int64_t whole = shape.outer * shape.channels * shape.inner * bytes;
  grid.by_rows = dense && shape.inner <= 256;
  grid.most_threads = threads_for(shape, bytes);
  if (grid.by_rows && shape.inner == 1) {
    // wide parts, for memory is read best in long runs; what L2 holds anyway is divided by columns, which need no merging
    grid.channels_per_group = whole <= l2_share ? max(64, shape.channels / 8 / 16 * 16) : max_width * 4 / bytes;
  } else if (grid.by_rows) {
    grid.channels_per_group = min(max_width * 2 / bytes / shape.inner, l2_share / (shape.outer * shape.inner * bytes));
  } else {
    grid.channels_per_group = l2_share / (shape.outer * shape.inner * bytes);
  }
  if (shape.inner > 1) grid.channels_per_group = min(grid.channels_per_group, shape.channels / least_groups);
  grid.channels_per_group = max(1, min(min(grid.channels_per_group, shape.channels), max_width));
  grid.groups = ceil_div(shape.channels, grid.channels_per_group);
  // Where no cache holds a group until the second pass, or groups are too few for many threads, they are cut along `outer`.
  int64_t chunks = 1;
  if (grid.by_rows && shape.inner == 1 && whole > l2_share) {
    chunks = min(most_chunks, ceil_div(whole, grid.groups * chunk_bytes));
  } else if (whole > l2_share / 4) {
    chunks = ceil_div(least_groups, grid.groups);
  }
  grid.outer_per_chunk = ceil_div(shape.outer, chunks);
  grid.chunks = ceil_div(shape.outer, grid.outer_per_chunk);
  return grid;
}

// For one pass: through memory from one end to the other. A plane is worth a loop from a vector's length on.
inline Grid divide_once(const Shape& shape, bool dense, int64_t bytes) {
  if (shape.inner == 1) return divide(shape, dense, bytes);
  Grid grid;
  grid.by_rows = dense && shape.inner < 16;
  grid.most_threads = threads_for(shape, bytes);
  // a part by rows first spreads its coefficients, which several rows must pay for
  grid.outer_per_chunk = grid.by_rows ? ceil_div(shape.outer, ceil_div(shape.outer, 32)) : ceil_div(shape.outer, most_chunks);
  grid.chunks = ceil_div(shape.outer, grid.outer_per_chunk);
  const int64_t width = grid.by_rows ? max_width / 2 / shape.inner : max_width;
  const int64_t groups = max(ceil_div(least_groups, grid.chunks), ceil_div(shape.channels, width));
  grid.channels_per_group = ceil_div(shape.channels, groups);
  grid.groups = ceil_div(shape.channels, grid.channels_per_group);
  return grid;
}

// f(i) for each i below `count`, by some of a team of threads. The team is always whole: libgomp ends the threads that a
// smaller one leaves out, and would have to start them again for the convolution that follows.
template <class F>
void parallel_for(int64_t count, int64_t team, int64_t some, const F& f) {
#ifdef _OPENMP
  if (min(team, some) > 1 && count > 1 && !forked()) {
#pragma omp parallel num_threads(static_cast<int>(team))
    {
      const int64_t at_work = min(min(omp_get_num_threads(), some), count), thread = omp_get_thread_num();
      if (thread < at_work)
        for (int64_t i = count * thread / at_work; i < count * (thread + 1) / at_work; i++) f(i);
    }
    return;
  }
#endif
  for (int64_t i = 0; i < count; i++) f(i);
}

// The parts of a single pass.
template <class Apply>
void in_parts(const Layer& layer, const Grid& grid, const Apply& apply) {
  parallel_for(grid.groups * grid.chunks, layer.threads, grid.most_threads,
               [&](int64_t i) { apply(grid.part(layer.shape, i % grid.groups, i / grid.groups)); });
}

// reduce, finish and apply, part by part where a part is a whole group: apply finds it in the cache. Else each for all parts
// before the next; finish then merges the chunks of a group and is given the first.
template <class Reduce, class Finish, class Apply>
void in_parts(const Layer& layer, const Grid& grid, const Reduce& reduce, const Finish& finish, const Apply& apply) {
  if (grid.chunks == 1) {
    return in_parts(layer, grid, [&](const Part& part) {
      reduce(part);
      finish(part);
      apply(part);
    });
  }
  in_parts(layer, grid, reduce);
  for (int64_t group = 0; group < grid.groups; group++) finish(grid.part(layer.shape, group, 0));
  in_parts(layer, grid, apply);
}

template <class T>
struct Scratch {
  T* const data;

  explicit Scratch(int64_t count) : data(static_cast<T*>(std::malloc(max(1, count) * sizeof(T)))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// A pair of float64 for each channel and chunk: what the parts say, before it is merged.
class Partials {
 public:
  Partials(const Shape& shape, int64_t chunks) : channels_(shape.channels), pairs_(2 * chunks * channels_) {}

  double* first(int64_t chunk) const { return pairs_.data + 2 * chunk * channels_; }
  double* second(int64_t chunk) const { return first(chunk) + channels_; }

 private:
  int64_t channels_;
  Scratch<double> pairs_;
};

}  // namespace
}  // namespace batchnorm
