// The interface: what a call works on, and one table of passes for each instruction set.
//
// Every tensor is seen as (outer, channels, inner) with an inner stride of 1, sizes and strides in elements:
//
//     (N, C, *S) contiguous      outer = N          inner = |S|
//     channels-last and (N, C)   outer = N·|S|      inner = 1
//
// and a slice of channels, a concatenation's gradient, is the same with a larger outer stride.
#pragma once

#include <cstdint>

namespace batchnorm {

enum class Number : int { f32, f64, bf16, f16 };
enum class Activation : int { none, relu, leaky_relu, relu6 };

struct Shape {
  int64_t outer, channels, inner;
  int64_t count() const { return outer * inner; }  // values of a channel
};

struct Tensor {
  void* data = nullptr;  // null: there is none
  int64_t outer_stride = 0, channel_stride = 0;
};

// (C,) values, contiguous.
struct Values {
  void* data = nullptr;  // null: the default of its role
  Number number = Number::f32;
};

// y = activation(weight·(x - mean)/√(variance + eps) + bias + residual)
struct Layer {
  Shape shape;
  Number number;  // of x, y, residual and their gradients
  Values weight, bias;
  double eps;
  Activation activation;
  double slope;  // of leaky_relu
  int threads;   // at most; the result is the same for any number
};

// variance = m2 / count; a mean and a variance are moments with a count of 1.
struct Moments {
  Values mean, m2;
  double count;
};

struct Forward {
  Tensor x, residual, y;  // y null: only the moments are wanted
  Moments moments;        // float64; written, unless they are given
  bool given;
};

// What a gradient of x needs of all the values that its moments are of: the means of g and of g·x̂, (C,) each.
struct Averages {
  const double *g = nullptr, *product = nullptr;  // null: they are taken from this call's own values
};

struct Backward {
  Tensor dy, x;
  Tensor y;  // null: what the activation was given is computed again from x, as is possible without a residual
  Moments moments;
  bool given;             // the moments are constants, as in evaluation
  Tensor dx, dresidual;   // null: not wanted
  Values dweight, dbias;  // null: not wanted
  Averages averages;      // where the moments are of more values than this x, or of fewer
};

struct Kernels {
  const char* name;
  void (*forward)(const Layer&, const Forward&);
  void (*backward)(const Layer&, const Backward&);
};

// Those in use: of the best instruction set that this machine has, unless `choose` named another.
const Kernels& kernels();
bool choose(const char* name);  // false: there is none of that name, or this machine cannot run it

// The same for groups of `group` outer rows, which have moments, averages, dweight and dbias of their own, (groups, C); what is
// left over joins the last group.
void forward(const Layer&, const Forward&, int64_t group);
void backward(const Layer&, const Backward&, int64_t group);

// The running statistics follow the batch, and `batches`, unless null, counts it: see functional.track. False, and nothing
// done, when the moments are not all finite, or of fewer than two values.
bool track(int64_t channels, double count, const double* mean, const double* m2, Values running_mean,
           Values running_var, double rate, int64_t* batches);

// The moments of `parts`, of one count each, merged into `mean` and `m2` in their order (Chan, Golub & LeVeque 1979); steps are
// in float64, from a part to the next. Returns the count of all.
double merge(int64_t parts, int64_t channels, const double* counts, int64_t count_step, const double* means,
             const double* m2s, int64_t step, double* mean, double* m2);

// True once this process was forked off one that may have had threads: they are gone, so nothing may wait for them.
bool forked();

}  // namespace batchnorm
