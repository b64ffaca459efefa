// The choice of the instruction set, and what needs none: the running statistics, and whether this process was forked.
#include <atomic>
#include <cmath>
#include <cstring>

#include "kernels.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace batchnorm {

#if defined(BATCHNORM_X86)
extern const Kernels kernels_avx512, kernels_avx2;
#endif
extern const Kernels kernels_baseline;

namespace {

// Null where this machine cannot run it.
const Kernels* runnable(const char* name) {
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
#if defined(BATCHNORM_X86)
  __builtin_cpu_init();
  if (is("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma"))
    return &kernels_avx512;
  if (is("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kernels_avx2;
#endif
  return is("baseline") ? &kernels_baseline : nullptr;
}

const Kernels* best() {
  const Kernels* found = runnable("avx512");
  if (found == nullptr) found = runnable("avx2");
  return found != nullptr ? found : &kernels_baseline;
}

std::atomic<const Kernels*> in_use{best()};
std::atomic<bool> in_fork{false};

#if defined(__unix__) || defined(__APPLE__)
const int registered = pthread_atfork(nullptr, nullptr, [] { in_fork = true; });
#endif

template <class T>
bool follow(int64_t channels, double count, const double* mean, const double* m2, T* running_mean, T* running_var,
            double rate) {
  const double divisor = count - 1;
  if (!(divisor > 0)) return false;
  for (int64_t c = 0; c < channels; c++)
    if (!std::isfinite(static_cast<T>(mean[c])) || !std::isfinite(static_cast<T>(m2[c] / divisor))) return false;
  for (int64_t c = 0; c < channels; c++) {
    running_mean[c] = static_cast<T>(running_mean[c] + rate * (mean[c] - running_mean[c]));
    running_var[c] = static_cast<T>(running_var[c] + rate * (m2[c] / divisor - running_var[c]));
  }
  return true;
}

}  // namespace

const Kernels& kernels() { return *in_use; }

bool choose(const char* name) {
  const Kernels* found = runnable(name);
  if (found != nullptr) in_use = found;
  return found != nullptr;
}

bool track(int64_t channels, double count, const double* mean, const double* m2, Values running_mean,
           Values running_var, double rate, int64_t* batches) {
  const auto followed = [&](auto number) {
    using T = decltype(number);
    return follow(channels, count, mean, m2, static_cast<T*>(running_mean.data), static_cast<T*>(running_var.data), rate);
  };
  const bool entered = running_mean.number == Number::f64 ? followed(double()) : followed(float());
  if (entered && batches != nullptr) ++*batches;
  return entered;
}

double merge(int64_t parts, int64_t channels, const double* counts, int64_t count_step, const double* means,
             const double* m2s, int64_t step, double* mean, double* m2) {
  double count = 0;
  for (int64_t c = 0; c < channels; c++) mean[c] = m2[c] = 0;
  for (int64_t part = 0; part < parts; part++) {
    const double added = counts[part * count_step];
    if (!(added > 0)) continue;  // whatever its mean and m2 are
    const double total = count + added, moved = added / total, spread = count * moved;
    const double *middle = means + part * step, *squares = m2s + part * step;
    for (int64_t c = 0; c < channels; c++) {
      const double distance = middle[c] - mean[c];
      mean[c] = count == 0 ? middle[c] : mean[c] + distance * moved;
      m2[c] += count == 0 ? squares[c] : squares[c] + distance * distance * spread;
    }
    count = total;
  }
  return count;
}

bool forked() { return in_fork; }

}  // namespace batchnorm
