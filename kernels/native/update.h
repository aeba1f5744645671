// The row-wise optimizers: rules.py is their definition, rounding.py that of stochastic rounding.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

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
INLINE void round_stochastically(BFloat16* out, const float* x, int64_t n, uint32_t key, int64_t row) {
  const uint32_t row_key = mix(key ^ (uint32_t(row) + uint32_t(uint64_t(row) >> 32) * GOLDEN));
  auto round = [](float value, uint32_t random) {
    const uint32_t bits = bits_of(value);
    BFloat16 nearest;
    narrow(value, nearest);
    const bool finite = (bits & 0x7f800000) != 0x7f800000;
    return BFloat16{finite ? uint16_t((bits + random) >> 16) : nearest.bits};
  };
  for (int64_t pair = 0; 2 * pair < n; ++pair) {
    uint32_t word = row_key * (uint32_t(pair + 1) * GOLDEN | 1);
    word ^= word >> 15;
    out[2 * pair] = round(x[2 * pair], word * FIRST >> 16);
    if (2 * pair + 1 < n) out[2 * pair + 1] = round(x[2 * pair + 1], word * SECOND >> 16);
  }
}

// A is the accumulator of T.
template <class A, class T> struct Update final : Destination<A> {
  const UpdateNumbers numbers;
  explicit Update(const UpdateNumbers& numbers) : numbers(numbers) {}

  void fetch(int64_t row) const override {
    const int64_t w = numbers.width;
    prefetch_to_write(static_cast<T*>(numbers.table) + row * w, w * int64_t(sizeof(T)));
    if (numbers.first_moment != nullptr)
      prefetch_to_write(static_cast<A*>(numbers.first_moment) + row * w, w * int64_t(sizeof(A)));
    const int64_t second = numbers.rule == LAZY_ADAM ? w : 1;
    if (numbers.second_moment != nullptr)
      prefetch_to_write(static_cast<A*>(numbers.second_moment) + row * second, second * int64_t(sizeof(A)));
  }

  void put(int64_t row, const A* g, double& squares) const override {
    const int64_t w = numbers.width;
    T* values = static_cast<T*>(numbers.table) + row * w;
    A* m = numbers.first_moment == nullptr ? nullptr : static_cast<A*>(numbers.first_moment) + row * w;
    A* v = numbers.second_moment == nullptr
               ? nullptr : static_cast<A*>(numbers.second_moment) + row * (numbers.rule == LAZY_ADAM ? w : 1);
    const double square = sum_of_squares(g, w);
    squares += square;
    A stack[256];
    std::vector<A> heap(w > 256 ? w : 0);
    A* x = w > 256 ? heap.data() : stack;
    for (int64_t i = 0; i < w; ++i) x[i] = widen(values[i]);
    if (numbers.decay != 1.0) {
      const A decay = A(numbers.decay);
      for (int64_t i = 0; i < w; ++i) x[i] *= decay;
    }
    step(x, g, m, v, A(square / double(w)));
    if constexpr (sizeof(T) == 2 && sizeof(A) == 4) {
      if (numbers.stochastic) return round_row(values, x, row);
    }
    round_into(values, x, w);
  }

 private:
  void round_row(BFloat16* values, const float* x, int64_t row) const {
    round_stochastically(values, x, numbers.width, numbers.key, row);
  }
  void round_row(Float16* values, const float* x, int64_t) const { round_into(values, x, numbers.width); }

  static INLINE void first_moment(A* __restrict m, const A* __restrict g, double beta, int64_t w) {
    const A kept = A(beta), added = A(1 - beta);
    for (int64_t i = 0; i < w; ++i) m[i] = kept * m[i] + added * g[i];
  }

  INLINE void step(A* __restrict x, const A* __restrict g, A* m, A* v, A mean_square) const {
    const int64_t w = numbers.width;
    const A lr = A(numbers.lr), eps = A(numbers.eps), beta2 = A(numbers.beta2), rest = A(1 - numbers.beta2);
    if (numbers.rule == SGD) {
      for (int64_t i = 0; i < w; ++i) x[i] -= lr * g[i];
      return;
    }
    if (numbers.rule == ROW_ADAGRAD) {
      *v += mean_square;
      const A scale = lr / (std::sqrt(*v) + eps);
      for (int64_t i = 0; i < w; ++i) x[i] -= scale * g[i];
      return;
    }
    if (m != nullptr) first_moment(m, g, numbers.beta1, w);
    const A* direction = m == nullptr ? g : m;
    const A correction1 = m == nullptr ? A(1) : A(numbers.correction1), correction2 = A(numbers.correction2);
    if (numbers.rule == ROW_ADAM) {
      *v = beta2 * *v + rest * mean_square;
      const A scale = lr / (std::sqrt(*v / correction2) + eps);
      for (int64_t i = 0; i < w; ++i) x[i] -= scale * (direction[i] / correction1);
      return;
    }
    for (int64_t i = 0; i < w; ++i) {
      v[i] = beta2 * v[i] + rest * (g[i] * g[i]);
      x[i] -= lr / (std::sqrt(v[i] / correction2) + eps) * (direction[i] / correction1);
    }
  }
};

}  // namespace prefixmem
