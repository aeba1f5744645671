// Where the summed gradient of a row goes: into a row of a dense or sparse gradient, or into an update of the table.
#pragma once
#include <cstdint>

#include "numbers.h"

namespace prefixmem {
// Sums come in A, float or double; each row comes once, from any thread.
template <class A> struct Destination {
  virtual void fetch(int64_t row) const = 0;
  virtual void put(int64_t row, const A* sum, double& squares) const = 0;
  virtual ~Destination() = default;
};

// Partial sums in a fixed number, so that the compiler keeps them in registers and every processor adds in one order.
template <class A> INLINE double sum_of_squares(const A* x, int64_t n) {
  constexpr int LANES = 16;
  A lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int k = 0; k < LANES; ++k) lanes[k] += x[i + k] * x[i + k];
  for (int k = 0; i + k < n; ++k) lanes[k] += x[i + k] * x[i + k];
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  return double(lanes[0]);
}

// The sums themselves, in the dtype of the gradient.
template <class A, class T> struct Sums final : Destination<A> {
  T* out;  // [rows, w]
  int64_t width;
  Sums(void* out, int64_t width) : out(static_cast<T*>(out)), width(width) {}
  void fetch(int64_t) const override {}
  void put(int64_t row, const A* sum, double&) const override { round_into(out + row * width, sum, width); }
};

// sum += vector, or sum = vector where nothing is held
template <class A, class T> INLINE void add_or_copy(A* __restrict sum, uint8_t& held, const T* __restrict vector, int64_t n) {
  if (held) return add(sum, vector, n);
  for (int64_t i = 0; i < n; ++i) sum[i] = widen(vector[i]);
  held = 1;
}

// The same of any dtype that gradients have.
template <class A> INLINE void add_vector(A* sum, uint8_t& held, const void* vector, DType dtype, int64_t n) {
  switch (dtype) {
    case FLOAT64: return add_or_copy(sum, held, static_cast<const double*>(vector), n);
    case BFLOAT16: return add_or_copy(sum, held, static_cast<const BFloat16*>(vector), n);
    case FLOAT16: return add_or_copy(sum, held, static_cast<const Float16*>(vector), n);
    default: return add_or_copy(sum, held, static_cast<const float*>(vector), n);
  }
}

INLINE int64_t bytes_of(DType dtype) {
  constexpr int64_t bytes[] = {4, 8, 2, 2, 1, 1};
  return bytes[dtype];
}

// dS: [M, A, H * w] for codes, [places, H * w] for a token stream.
struct Gradient {
  const void* data;
  DType dtype;
  int64_t width;  // H * w
};

}  // namespace prefixmem
