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

#if defined(__AVX512F__)
constexpr size_t stored = 64;
inline void store_around_cache(char* to, const char* from) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif defined(__AVX__)
constexpr size_t stored = 32;
inline void store_around_cache(char* to, const char* from) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#elif defined(__x86_64__)
constexpr size_t stored = 16;
inline void store_around_cache(char* to, const char* from) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#else
constexpr size_t stored = 16;
inline void store_around_cache(char* to, const char* from) { std::memcpy(to, from, stored); }
#endif

inline void stream(void* to, const void* from, size_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  size_t head = -reinterpret_cast<uintptr_t>(out) % stored;
  head = head < bytes ? head : bytes;
  std::memcpy(out, in, head);
  size_t at = head;
  for (; at + stored <= bytes; at += stored) store_around_cache(out + at, in + at);
  std::memcpy(out + at, in + at, bytes - at);
}

// What was stored so must be seen by the thread that is told of it.
inline void stream_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace batchnorm
