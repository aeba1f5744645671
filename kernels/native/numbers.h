// Numbers of a table: float32, float64, bfloat16, float16, and bytes of quantized rows; all are widened exactly.
#pragma once
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

// Before a loop whose turns depend on none before.
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace prefixmem {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };
struct Int8 { int8_t value; };
struct Float8 { uint8_t bits; };  // e4m3fn: no infinities, and one NaN of each sign

// In the order of DTYPES in operation/native.py.
enum DType : int32_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, INT8, FLOAT8 };

INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }

INLINE float widen(Float16 x) {
  uint32_t magnitude = x.bits & 0x7fff;
  uint32_t rebiased = (magnitude << 13) + (112u << 23);                 // exponent bias 15 to 127
  rebiased += magnitude >= 0x7c00 ? 112u << 23 : 0;                     // infinity and NaN
  uint32_t subnormal = bits_of(float(int32_t(magnitude)) * 0x1p-24f);
  return float_of((magnitude < 0x400 ? subnormal : rebiased) | uint32_t(x.bits & 0x8000) << 16);
}

INLINE float widen(Int8 x) { return float(x.value); }

INLINE float widen(Float8 x) {
  // The same bits as a float16 mean 2^-8 of it.
  const float value = widen(Float16{uint16_t((x.bits & 0x80) << 8 | (x.bits & 0x7f) << 7)}) * 256.0f;
  return (x.bits & 0x7f) == 0x7f ? float_of(0x7fc00000) : value;
}

// To nearest, ties to even.
INLINE void narrow(float x, float& out) { out = x; }
INLINE void narrow(double x, double& out) { out = x; }

INLINE void narrow(float x, BFloat16& out) {
  uint32_t bits = bits_of(x);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out.bits = uint16_t(x != x ? 0x7fc0 : rounded);
}

INLINE void narrow(float x, Float16& out) {
  uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  uint32_t rebiased = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // an ulp of 0.5 is the smallest float16
  uint32_t half = magnitude < 113u << 23 ? subnormal : rebiased;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;                             // 65520 and more round to infinity
  half = x != x ? 0x7e00 : half;
  out.bits = uint16_t(half | (bits >> 16 & 0x8000));
}

template <class T> struct AccumulatorOf { using type = float; };
template <> struct AccumulatorOf<double> { using type = double; };
template <class T> using Accumulator = typename AccumulatorOf<T>::type;

// Calls f(i) for every column of 0 .. n - 1, none of which depends on another: 16 at a time, which the compiler turns into
// vectors without asking how many are left.
template <class F> INLINE void columns(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    INDEPENDENT
    for (int k = 0; k < 16; ++k) f(i + k);
  }
  for (; i < n; ++i) f(i);
}

// sum += row, element by element
template <class A, class T> INLINE void add(A* __restrict sum, const T* __restrict row, int64_t n) {
  columns(n, [=](int64_t i) { sum[i] += widen(row[i]); });
}

template <class A, class T> INLINE void add_scaled(A* __restrict sum, const T* __restrict row, float scale, int64_t n) {
  columns(n, [=](int64_t i) { sum[i] += widen(row[i]) * scale; });
}

template <class A, class T> INLINE void round_into(T* __restrict out, const A* __restrict x, int64_t n) {
  columns(n, [=](int64_t i) { narrow(x[i], out[i]); });
}

template <class A> INLINE void clear(A* x, int64_t n) {
  columns(n, [=](int64_t i) { x[i] = 0; });
}

INLINE void prefetch(const void* start, int64_t bytes) {
  const char* first = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(start) & ~uintptr_t(63));
  for (const char* line = first; line < static_cast<const char*>(start) + bytes; line += 64) __builtin_prefetch(line);
}

INLINE void prefetch_to_write(const void* start, int64_t bytes) {
  const char* first = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(start) & ~uintptr_t(63));
  for (const char* line = first; line < static_cast<const char*>(start) + bytes; line += 64)
    __builtin_prefetch(line, 1);
}

}  // namespace prefixmem
