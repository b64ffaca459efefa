// torch's tensors without torch: what its objects say of themselves through DLPack's C exchange API (version 1.3),
// a table of functions that a capsule of torch.Tensor holds. A call costs a tenth of a microsecond; asking in Python for
// address, sizes, strides and dtype costs a whole one.
#pragma once

#include <Python.h>

#include <cstdint>

#include "kernels.h"

namespace batchnorm {

// The ABI of dlpack.h, as far as it is used here.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ExchangeAPI {
  uint32_t major, minor;
  void* previous;
  void *allocate, *export_managed, *import_managed;
  int (*view)(void* object, DLTensor* out);  // without ownership: holds until control returns to Python
};

// A tensor on the CPU, of a dtype that the kernels know.
struct View {
  DLTensor tensor;
  Number number;

  int64_t size(int dim) const { return tensor.shape[dim]; }
  int dims() const { return tensor.ndim; }
  void* data() const { return static_cast<char*>(tensor.data) + tensor.byte_offset; }
  Values values() const { return {data(), number}; }

  // Whether the dimensions, in the order given, lie densely one in the other, the last fastest.
  template <class Order>
  bool dense(const Order& dim_at) const {
    int64_t expected = 1;
    for (int i = dims() - 1; i >= 0; i--) {
      const int dim = dim_at(i);
      if (size(dim) != 1 && tensor.strides[dim] != expected) return false;
      expected *= size(dim);
    }
    return true;
  }
  bool contiguous() const {
    return dense([](int i) { return i; });
  }
  // (N, C, *S) in the order N, *S, C.
  bool channels_last() const {
    const int last = dims() - 1;
    return dense([last](int i) { return i == 0 ? 0 : i == last ? 1 : i + 1; });
  }
  // (channels,) values side by side.
  bool per_channel(int64_t channels) const { return dims() == 1 && size(0) == channels && contiguous(); }
};

class Exchange {
 public:
  // False, and nothing changed: the table is of a version that is not known here.
  bool use(const ExchangeAPI* table) {
    if (table == nullptr || table->major != 1 || table->minor < 3 || table->view == nullptr) return false;
    api_ = table;
    return true;
  }

  // False where the object is no such tensor; no Python error is left behind.
  bool view(PyObject* object, View& found) const {
    if (api_ == nullptr) return false;
    if (api_->view(object, &found.tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    const DLTensor& t = found.tensor;
    if (t.device_type != cpu_ || t.type_lanes != 1) return false;
    if (t.type_code == float_ && t.type_bits == 32) return found.number = Number::f32, true;
    if (t.type_code == float_ && t.type_bits == 64) return found.number = Number::f64, true;
    if (t.type_code == float_ && t.type_bits == 16) return found.number = Number::f16, true;
    if (t.type_code == bfloat_ && t.type_bits == 16) return found.number = Number::bf16, true;
    return false;
  }

  // The address of a 0-dimensional int64 tensor on the CPU, or null.
  int64_t* counter(PyObject* object) const {
    DLTensor t;
    if (api_ == nullptr) return nullptr;
    if (api_->view(object, &t) != 0) {
      PyErr_Clear();
      return nullptr;
    }
    const bool fits = t.device_type == cpu_ && t.type_code == int_ && t.type_bits == 64 && t.ndim == 0;
    return fits ? reinterpret_cast<int64_t*>(static_cast<char*>(t.data) + t.byte_offset) : nullptr;
  }

 private:
  static constexpr int32_t cpu_ = 1;
  static constexpr uint8_t int_ = 0, float_ = 2, bfloat_ = 4;
  const ExchangeAPI* api_ = nullptr;
};

}  // namespace batchnorm
