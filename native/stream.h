// Stores that do not go through the cache: a result larger than the cache would first be read from memory, to be
// overwritten, and would push out what is still needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace batchnorm {
namespace {

constexpr size_t line_bytes = 64;  // of the cache

inline bool starts_line(const void* to) { return reinterpret_cast<uintptr_t>(to) % line_bytes == 0; }

// A whole line, from registers if the caller has just computed it: collected in a buffer of 1 to 4 KB first, a pass takes up
// to 15 % longer.
inline void store_line(void* to, const void* from) {
  [[maybe_unused]] auto* const out = static_cast<char*>(to);
  [[maybe_unused]] auto* const in = static_cast<const char*>(from);
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
#elif defined(__AVX__)
  for (size_t i = 0; i < line_bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i)));
#elif defined(__x86_64__)
  for (size_t i = 0; i < line_bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
#else
  std::memcpy(to, from, line_bytes);
#endif
}

// What was stored so must be seen by the thread that is told of it.
inline void stores_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace batchnorm
