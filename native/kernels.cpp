// The kernels, compiled once for each instruction set: BATCHNORM_ISA is its name.
//
// Everything here has internal linkage but the table at the end: what was compiled for one instruction set may not be
// linked into what was compiled for another.
#include "kernels.h"

#include <type_traits>

#include "passes.h"

namespace batchnorm {
namespace {

template <class F>
void with_number(Number number, const F& f) {
  switch (number) {
    case Number::f32: return f(float());
    case Number::f64: return f(double());
    case Number::bf16: return f(bf16());
    case Number::f16: return f(f16());
  }
}

template <Form form>
using Constant = std::integral_constant<Form, form>;

// ReLU of float32 and bfloat16 has loops of its own; every other activation shares one.
template <class E, class F>
void with_form(Activation activation, const F& f) {
  if (activation == Activation::none) return f(Constant<Form::none>());
  if constexpr (std::is_same_v<E, float> || std::is_same_v<E, bf16>)
    if (activation == Activation::relu) return f(Constant<Form::relu>());
  f(Constant<Form::bent>());
}

template <class F>
void with_flag(bool flag, const F& f) {
  return flag ? f(std::true_type()) : f(std::false_type());
}

bool dense(const Shape& shape, const Tensor& tensor) {
  return tensor.data == nullptr || tensor.channel_stride == shape.inner;
}

void forward(const Layer& layer, const Forward& call) {
  const Shape& shape = layer.shape;
  with_number(layer.number, [&](auto number) {
    using E = decltype(number);
    const bool side_by_side = dense(shape, call.x) && dense(shape, call.residual) && dense(shape, call.y);
    const Grid grid = (call.given ? divide_once : divide)(shape, side_by_side, sizeof(E));
    const Partials partials(shape, call.given ? 0 : grid.chunks);
    Coefficients<Wide<E>> coefficients(shape.channels);
    if (call.given) coefficients.set(layer, call.moments, 0, shape.channels);
    with_flag(grid.by_rows, [&](auto rows) {
      constexpr bool by_rows = decltype(rows)::value;
      const auto reduce = [&](const Part& part) {
        moments<E, by_rows>(shape, call.x, part, partials.first(part.chunk), partials.second(part.chunk));
      };
      const auto finish = [&](const Part& group) {
        merge_moments(shape, grid, group, partials, static_cast<double*>(call.moments.mean.data),
                      static_cast<double*>(call.moments.m2.data));
        if (call.y.data != nullptr) coefficients.set(layer, call.moments, group.first_channel, group.channels);
      };
      with_form<E>(layer.activation, [&](auto form) {
        with_flag(call.residual.data != nullptr, [&](auto residual) {
          const auto apply = [&](const Part& part) {
            if (call.y.data != nullptr)
              normalise<E, by_rows, decltype(form)::value, decltype(residual)::value>(layer, call, coefficients, part);
          };
          call.given ? in_parts(layer, grid, apply) : in_parts(layer, grid, reduce, finish, apply);
        });
      });
    });
  });
}

void backward(const Layer& layer, const Backward& call) {
  const Shape& shape = layer.shape;
  with_number(layer.number, [&](auto number) {
    using E = decltype(number);
    const bool side_by_side = dense(shape, call.dy) && dense(shape, call.x) && dense(shape, call.y) &&
                              dense(shape, call.dx) && dense(shape, call.dresidual);
    const bool known = call.averages.g != nullptr;
    const bool summed = !known && (!call.given || call.dweight.data != nullptr || call.dbias.data != nullptr);
    const Grid grid = summed ? divide(shape, side_by_side, 2 * sizeof(E)) : divide_once(shape, side_by_side, sizeof(E));
    const Partials partials(shape, summed ? grid.chunks : 0);
    Coefficients<Wide<E>> coefficients(shape.channels);
    coefficients.set(layer, call.moments, 0, shape.channels);
    if (known) coefficients.set_slopes(layer, 0, shape.channels, call.averages);
    with_flag(grid.by_rows, [&](auto rows) {
      constexpr bool by_rows = decltype(rows)::value;
      const auto finish = [&](const Part& group) {
        double *const sums = partials.first(0), *const moved = partials.second(0);
        const int64_t end = group.first_channel + group.channels;
        for (int64_t chunk = 1; chunk < grid.chunks; chunk++) {
          const double *more = partials.first(chunk), *more_moved = partials.second(chunk);
#pragma omp simd
          for (int64_t c = group.first_channel; c < end; c++) {
            sums[c] += more[c];
            moved[c] += more_moved[c];
          }
        }
        const double share = 1 / static_cast<double>(shape.count());
        for (int64_t c = group.first_channel; c < end; c++) {
          store(call.dweight, c, moved[c] *= coefficients.inverse[c]);
          store(call.dbias, c, sums[c]);
          sums[c] *= share;
          moved[c] *= share;
        }
        if (!call.given) coefficients.set_slopes(layer, group.first_channel, group.channels, {sums, moved});
      };
      with_form<E>(layer.activation, [&](auto form) {
        constexpr Form F = decltype(form)::value;
        with_flag(call.y.data != nullptr, [&](auto known) {
          constexpr bool from_y = F != Form::none && decltype(known)::value;
          const auto reduce = [&](const Part& part) {
            products<E, by_rows, F, from_y>(layer, call, coefficients, part, partials.first(part.chunk),
                                            partials.second(part.chunk));
          };
          with_flag(call.given, [&](auto given) {
            const auto apply = [&](const Part& part) {
              if (call.dx.data != nullptr || (from_y && call.dresidual.data != nullptr))
                gradients<E, by_rows, F, from_y, decltype(given)::value>(layer, call, coefficients, part);
            };
            summed ? in_parts(layer, grid, reduce, finish, apply) : in_parts(layer, grid, apply);
          });
        });
      });
    });
  });
}

}  // namespace

#define BATCHNORM_JOIN(a, b) a##b
#define BATCHNORM_TABLE(isa) BATCHNORM_JOIN(kernels_, isa)
#define BATCHNORM_TEXT(isa) #isa
#define BATCHNORM_NAME(isa) BATCHNORM_TEXT(isa)
extern const Kernels BATCHNORM_TABLE(BATCHNORM_ISA);
const Kernels BATCHNORM_TABLE(BATCHNORM_ISA){BATCHNORM_NAME(BATCHNORM_ISA), forward, backward};

}  // namespace batchnorm
