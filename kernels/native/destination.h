// Where the summed gradient of a row goes: into a row of a dense or sparse gradient, or into an update of the table.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.h"
#include "streams.h"

namespace prefixmem {
// Lines of the gradients of a SID that comes soon, fetched a few at a time.
struct ComingLines {
  static constexpr int64_t AT_A_TIME = 4;
  std::vector<const char*> starts;
  int64_t bytes = 0;
  size_t vector = 0;
  const char *at = nullptr, *end = nullptr;

  INLINE void fetch() {
    if (at >= end) {
      if (vector == starts.size()) return;
      at = starts[vector++], end = at + bytes;
    }
    for (int64_t line = 0; line < AT_A_TIME; ++line) __builtin_prefetch(at + 64 * line);  // some past the end: no harm
    at += 64 * AT_A_TIME;
  }
  void fetch_rest() {
    while (at < end || vector < starts.size()) fetch();
  }
  void begin() { starts.clear(), vector = 0, at = end = nullptr; }
};

// The H rows of a prefix whose sum is whole: rows, -1 for none, or -2 - slot of a sum that goes aside.
template <class A> struct Delivery {
  const int64_t* targets;
  const int64_t* coming;  // targets that are fetched meanwhile, one with each: in a burst they would wait; may be null
  ComingLines* gradients;
  A* aside;
  int32_t heads;
  int64_t width;
};

// Sums come in A, float or double; each row comes once, from any thread.
template <class A> struct Destination {
  virtual void fetch(int64_t row) const = 0;
  virtual void deliver(const Delivery<A>& to, const A* sum, double& squares) const = 0;
  virtual ~Destination() = default;

  // One row.
  void put(int64_t row, const A* sum, int64_t width, double& squares) const {
    ComingLines none;
    deliver({&row, nullptr, &none, nullptr, 1, width}, sum, squares);
  }
};

// What is put aside is read at the end: past the caches where it is whole lines.
INLINE void put_aside(void* slot, const void* sum, int64_t bytes) {
  if (bytes % 64 == 0)
    stream(slot, sum, bytes);
  else
    std::memcpy(slot, sum, bytes);
}

template <class A, class Self> struct DestinationOf : Destination<A> {
  void deliver(const Delivery<A>& to, const A* sum, double& squares) const final {
    const Self& self = static_cast<const Self&>(*this);
    for (int32_t h = 0; h < to.heads; ++h, sum += to.width) {
      if (to.coming != nullptr && to.coming[h] >= 0) self.Self::fetch(to.coming[h]);
      to.gradients->fetch();
      if (to.targets[h] >= 0)
        self.Self::put(to.targets[h], sum, squares);
      else if (to.targets[h] <= -2)
        put_aside(to.aside + (-2 - to.targets[h]) * to.width, sum, to.width * int64_t(sizeof(A)));
    }
  }
};

// Partial sums in a fixed number, so that the compiler keeps them in registers and every processor adds in one order.
template <class A> INLINE double sum_of_squares(const A* x, int64_t n) {
  typedef A Lanes __attribute__((vector_size(8 * sizeof(A))));
  Lanes even = {}, odd = {}, part;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    std::memcpy(&part, x + i, sizeof(part));
    even += part * part;
    std::memcpy(&part, x + i + 8, sizeof(part));
    odd += part * part;
  }
  for (; i < n; i += 8) {
    part = Lanes{};
    std::memcpy(&part, x + i, std::min<int64_t>(8, n - i) * sizeof(A));
    even += part * part;
  }
  even += odd;
  return double(((even[0] + even[4]) + (even[2] + even[6])) + ((even[1] + even[5]) + (even[3] + even[7])));
}

// The sums themselves, in the dtype of the gradient.
template <class A, class T> struct Sums final : DestinationOf<A, Sums<A, T>> {
  T* out;  // [rows, w]
  int64_t width;
  Sums(void* out, int64_t width) : out(static_cast<T*>(out)), width(width) {}
  INLINE void fetch(int64_t) const override {}
  INLINE void put(int64_t row, const A* sum, double&) const { round_into(out + row * width, sum, width); }
};

// sum += vector, or sum = vector where nothing is held
template <class A, class T> INLINE void add_or_copy(A* __restrict sum, uint8_t& held, const T* __restrict vector, int64_t n) {
  if (held) return add(sum, vector, n);
  columns(n, [=](int64_t i) { sum[i] = widen(vector[i]); });
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
