// Stores that pass the caches by, for results that are larger than they are.
#pragma once
#include <cstdint>
#include <cstring>

#include "numbers.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace prefixmem {

constexpr int64_t STREAMED_BYTES = 8 << 20;

// Copies whole lines of 64 bytes to a place that begins one; call `end_streams` before another thread reads them.
INLINE void stream(void* __restrict to, const void* __restrict from, int64_t bytes) {
#if defined(__AVX2__)
  auto* out = static_cast<__m256i*>(to);
  auto* in = static_cast<const __m256i*>(from);
  for (int64_t i = 0; i < bytes / 32; ++i) _mm256_stream_si256(out + i, _mm256_loadu_si256(in + i));
#elif defined(__SSE2__)
  auto* out = static_cast<__m128i*>(to);
  auto* in = static_cast<const __m128i*>(from);
  for (int64_t i = 0; i < bytes / 16; ++i) _mm_stream_si128(out + i, _mm_loadu_si128(in + i));
#else
  std::memcpy(to, from, bytes);
#endif
}

INLINE void end_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace prefixmem
