// The little that a test program needs: failures are counted, and chance is the same every time.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <string>

namespace batchnorm::tests {

using Real = long double;

#if defined(__SANITIZE_ADDRESS__)
constexpr bool sanitized = true;  // slow: fewer and smaller problems
#else
constexpr bool sanitized = false;
#endif

inline int failures = 0;
inline std::string subject;  // what is being tested, to be said with a failure

__attribute__((format(printf, 2, 3))) inline bool check(bool holds, const char* format, ...) {
  if (holds) return true;
  if (failures++ < 30) {
    std::printf("FAILED %s: ", subject.c_str());
    va_list arguments;
    va_start(arguments, format);
    std::vprintf(format, arguments);
    va_end(arguments);
    std::printf("\n");
    std::fflush(stdout);
  }
  return false;
}

class Chance {
 public:
  explicit Chance(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    const uint64_t mixed = (state_ ^ (state_ >> 29)) * 0xbf58476d1ce4e5b9u;
    return static_cast<uint32_t>(mixed >> 32);
  }
  int below(int n) { return static_cast<int>(bits() % static_cast<uint32_t>(n)); }
  double uniform() { return bits() * 0x1p-32; }
  // Mean 0, standard deviation 1, at most 3.5 from the mean.
  double normal() { return (uniform() + uniform() + uniform() + uniform() - 2) * std::sqrt(3.0); }

 private:
  uint64_t state_;
};

}  // namespace batchnorm::tests
