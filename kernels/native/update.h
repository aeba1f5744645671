// The row-wise optimizers: rules.py is their definition, rounding.py that of stochastic rounding.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "destination.h"

namespace prefixmem {

enum Rule : int32_t { SGD, ROW_ADAGRAD, ROW_ADAM, LAZY_ADAM };

// One step of a table. Moments are of the accumulator's dtype, [R] or [R, w]; null where a rule keeps none.
struct UpdateNumbers {
  void* table;
  void *first_moment, *second_moment;
  int64_t width;
  int32_t dtype, rule, stochastic;
  uint32_t key;  // of stochastic rounding: the seed and the step mixed
  double lr, decay, eps, beta1, beta2, correction1, correction2;  // decay: 1 - lr * weight_decay
};

constexpr uint32_t GOLDEN = 0x9E3779B9u, FIRST = 0x21F0AAADu, SECOND = 0xD35A2D97u;

INLINE uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * FIRST;
  x = (x ^ x >> 15) * SECOND;
  return x ^ x >> 15;
}

// float32 to bfloat16, up with a probability equal to the part that is cut off; two columns share a word of random bits.
INLINE void round_stochastically(BFloat16* __restrict out, const float* __restrict x, int64_t first, int64_t n, uint32_t row_key) {
  columns(n, [=](int64_t i) {
    const uint32_t column = uint32_t(first + i);
    uint32_t word = row_key * (((column >> 1) + 1) * GOLDEN | 1);
    word ^= word >> 15;
    const uint32_t random = word * (column & 1 ? SECOND : FIRST) >> 16, bits = bits_of(x[i]);
    BFloat16 nearest;
    narrow(x[i], nearest);
    out[i].bits = (bits & 0x7f800000) != 0x7f800000 ? uint16_t((bits + random) >> 16) : nearest.bits;
  });
}

// A is the accumulator of T.
template <class A, class T> struct Update final : DestinationOf<A, Update<A, T>> {
  const UpdateNumbers numbers;
  explicit Update(const UpdateNumbers& numbers) : numbers(numbers) {}

  INLINE void fetch(int64_t row) const override {
    const int64_t w = numbers.width;
    prefetch_to_write(static_cast<T*>(numbers.table) + row * w, w * int64_t(sizeof(T)));
    if (numbers.first_moment != nullptr)
      prefetch_to_write(static_cast<A*>(numbers.first_moment) + row * w, w * int64_t(sizeof(A)));
    const int64_t second = numbers.rule == LAZY_ADAM ? w : 1;
    if (numbers.second_moment != nullptr)
      prefetch_to_write(static_cast<A*>(numbers.second_moment) + row * second, second * int64_t(sizeof(A)));
  }

  INLINE void put(int64_t row, const A* g, double& squares) const {
    const int64_t w = numbers.width;
    T* values = static_cast<T*>(numbers.table) + row * w;
    A* m = numbers.first_moment == nullptr ? nullptr : static_cast<A*>(numbers.first_moment) + row * w;
    A* v = numbers.second_moment == nullptr
               ? nullptr : static_cast<A*>(numbers.second_moment) + row * (numbers.rule == LAZY_ADAM ? w : 1);
    const double square = sum_of_squares(g, w);
    squares += square;
    step(row, values, g, m, v, A(square / double(w)));
  }

 private:
  // values[i] = f(values[i], i), rounded as the table is.
  template <class F> INLINE void change(int64_t row, T* __restrict values, F&& f) const {
    const int64_t w = numbers.width;
    const A decay = A(numbers.decay);
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (numbers.stochastic) {
        constexpr int64_t COLUMNS = 64;
        const uint32_t key = mix(numbers.key ^ (uint32_t(row) + uint32_t(uint64_t(row) >> 32) * GOLDEN));
        for (int64_t first = 0; first < w; first += COLUMNS) {
          float x[COLUMNS];
          const int64_t n = std::min(COLUMNS, w - first);
          columns(n, [&](int64_t i) { x[i] = f(widen(values[first + i]) * decay, first + i); });
          round_stochastically(values + first, x, first, n, key);
        }
        return;
      }
    }
    if (decay == 1) return columns(w, [&](int64_t i) { narrow(f(widen(values[i]), i), values[i]); });
    columns(w, [&](int64_t i) { narrow(f(widen(values[i]) * decay, i), values[i]); });
  }

  INLINE void step(int64_t row, T* values, const A* __restrict g, A* __restrict m, A* __restrict v, A mean_square) const {
    const A lr = A(numbers.lr), eps = A(numbers.eps), beta2 = A(numbers.beta2), rest2 = A(1 - numbers.beta2);
    if (numbers.rule == SGD) return change(row, values, [=](A x, int64_t i) { return x - lr * g[i]; });
    if (numbers.rule == ROW_ADAGRAD) {
      *v += mean_square;
      const A scale = lr / (std::sqrt(*v) + eps);
      return change(row, values, [=](A x, int64_t i) { return x - scale * g[i]; });
    }
    const A *direction = g, correction2 = A(numbers.correction2);
    A correction1 = 1;
    if (m != nullptr) {
      const A beta1 = A(numbers.beta1), rest1 = A(1 - numbers.beta1);
      columns(numbers.width, [=](int64_t i) { m[i] = beta1 * m[i] + rest1 * g[i]; });
      direction = m, correction1 = A(numbers.correction1);
    }
    if (numbers.rule == ROW_ADAM) {
      *v = beta2 * *v + rest2 * mean_square;
      const A scale = lr / (std::sqrt(*v / correction2) + eps);
      return change(row, values, [=](A x, int64_t i) { return x - scale * (direction[i] / correction1); });
    }
    change(row, values, [=](A x, int64_t i) {
      v[i] = beta2 * v[i] + rest2 * (g[i] * g[i]);
      return x - lr / (std::sqrt(v[i] / correction2) + eps) * (direction[i] / correction1);
    });
  }
};

}  // namespace prefixmem
