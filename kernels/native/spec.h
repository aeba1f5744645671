// Where the rows of a Semantic ID are: the address spec, and rows from codes.
//
//   hashed order:  row = offset[n, h] + ( XOR_i c_i * p[i, h] ) mod T_n
//   exact order:   row = offset[n, h] + ( .. (c_1 * K_2 + c_2) * K_3 + .. ) * K_n + c_n
//
// Orders and levels count from 1, as in the paper; arrays of them have no place 0.
//
// Cross-item orders read windows of two items: levels 1 .. L are the codes of an earlier item, L + l is c_l of this one.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "numbers.h"

namespace prefixmem {

enum Mode : int32_t { PREFIX, SUFFIX, FULL };

// One reading of H rows: order n over the codes first .. last. It exists where the prefix has `last` codes.
struct Read {
  int32_t order, first, last;
};

// What a level that is read adds to the running sum. In prefix mode the sum goes on from the level before.
struct ActiveLevel {
  int32_t level, first_read, last_read;  // reads [first_read, last_read)
};

struct Spec {
  int32_t levels, orders, heads, mode;  // levels: codes of a window, L or 2L
  int32_t item_levels, gap;             // L; tokens of the items between the two of a window, which are not read
  bool narrow;  // hashes and moduli fit 32 bits
  std::vector<int64_t> sizes, multipliers, rows, offsets;  // [levels], [N * H], [N], [N * H]
  std::vector<uint8_t> exact;                              // [N]
  std::vector<uint64_t> reciprocals;                       // [N], of the moduli: ceil(2^64 / T)
  std::vector<ActiveLevel> active;
  std::vector<Read> reads;  // in the order in which a SID adds them
  int32_t last_order = 0;   // the last that an active level reads

  int64_t rows_a_sid() const { return int64_t(reads.size()) * heads; }
  // The first level that may be read.
  int32_t begin() const { return levels > item_levels ? item_levels : 1; }
};

// Integers of 2, 4 or 8 bytes.
struct Integers {
  const void* data = nullptr;
  int32_t bytes = 8;

  int64_t at(int64_t i) const {
    if (bytes == 8) return static_cast<const int64_t*>(data)[i];
    return bytes == 4 ? static_cast<const int32_t*>(data)[i] : static_cast<const int16_t*>(data)[i];
  }
};

// Reads a SID of codes [M, L]; returns how many of its codes stand before one that ends the prefix.
INLINE int32_t read_codes(const Spec& spec, const Integers& codes, int64_t sid, int64_t* out) {
  int32_t length = 0;
  while (length < spec.levels) {
    int64_t code = codes.at(sid * spec.levels + length);
    if (code < 0 || code >= spec.sizes[length]) break;
    out[length++] = code;
  }
  return length;
}

// x mod T. Below 2^32: Lemire, Kaser and Kurz, "Faster remainder by direct computation", 2019.
INLINE uint64_t modulo(uint64_t x, uint64_t rows, uint64_t reciprocal, bool narrow) {
  if (!narrow) return x % rows;
  return uint64_t((static_cast<unsigned __int128>(reciprocal * x) * rows) >> 64);
}

// Rows [H] of one order whose window begins at `window`.
inline void order_rows(const Spec& spec, const int64_t* __restrict window, int32_t order, int64_t* __restrict rows) {
  const int32_t heads = spec.heads;
  const int64_t* __restrict offsets = &spec.offsets[(order - 1) * heads];
  if (spec.exact[order - 1]) {
    int64_t index = 0;
    for (int32_t i = 0; i < order; ++i) index = index * spec.sizes[i] + window[i];
    for (int32_t h = 0; h < heads; ++h) rows[h] = offsets[h] + index;
    return;
  }
  const int64_t* __restrict multipliers = spec.multipliers.data();
  const uint64_t total = uint64_t(spec.rows[order - 1]), reciprocal = spec.reciprocals[order - 1];
  const bool narrow = spec.narrow;
  for (int32_t h = 0; h < heads; ++h) {
    uint64_t hash = 0;
    for (int32_t i = 0; i < order; ++i) hash ^= uint64_t(window[i] * multipliers[i * heads + h]);
    rows[h] = offsets[h] + int64_t(modulo(hash, total, reciprocal, narrow));
  }
}

// Calls rows_of(order, rows [HEADS]) for orders 1 .. `last` of a prefix, `HEADS` heads from `head` on: one running hash.
template <int HEADS, class F>
INLINE void nested_rows(const Spec& spec, const int64_t* __restrict codes, int32_t last, int32_t head, F&& rows_of) {
  uint64_t hash[HEADS] = {};
  int64_t rows[HEADS];
  uint64_t index = 0;  // of an exact order; beyond the last it may wrap
  const int32_t heads = spec.heads;
  const bool narrow = spec.narrow;
  for (int32_t n = 0; n < last; ++n) {
    const int64_t code = codes[n];
    const int64_t* __restrict multipliers = &spec.multipliers[n * heads + head];
    const int64_t* __restrict offsets = &spec.offsets[n * heads + head];
    for (int h = 0; h < HEADS; ++h) hash[h] ^= uint64_t(code * multipliers[h]);
    index = index * uint64_t(spec.sizes[n]) + uint64_t(code);
    if (spec.exact[n]) {
      for (int h = 0; h < HEADS; ++h) rows[h] = offsets[h] + int64_t(index);
    } else {
      const uint64_t total = uint64_t(spec.rows[n]), reciprocal = spec.reciprocals[n];
      for (int h = 0; h < HEADS; ++h) rows[h] = offsets[h] + int64_t(modulo(hash[h], total, reciprocal, narrow));
    }
    rows_of(n + 1, rows);
  }
}

// The same for all heads; rows_of(order, first head, rows, how many).
template <class F> INLINE void all_nested_rows(const Spec& spec, const int64_t* codes, int32_t last, F&& rows_of) {
  int32_t head = 0;
  for (; head + 4 <= spec.heads; head += 4)
    nested_rows<4>(spec, codes, last, head, [&](int32_t n, const int64_t* rows) { rows_of(n, head, rows, 4); });
  for (; head < spec.heads; ++head)
    nested_rows<1>(spec, codes, last, head, [&](int32_t n, const int64_t* rows) { rows_of(n, head, rows, 1); });
}

// Rows [reads, H] of a SID with `length` codes; -1 for what does not exist.
inline __attribute__((noinline)) void sid_rows(const Spec& spec, const int64_t* codes, int32_t length, int64_t* rows) {
  const int32_t heads = spec.heads;
  if (spec.mode == PREFIX) {  // order n is read n-th
    const int32_t last = std::min(length, spec.last_order);
    all_nested_rows(spec, codes, last, [&](int32_t n, int32_t head, const int64_t* found, int32_t count) {
      for (int32_t h = 0; h < count; ++h) rows[(n - 1) * heads + head + h] = found[h];
    });
    for (int64_t e = int64_t(last) * heads; e < spec.rows_a_sid(); ++e) rows[e] = -1;
    return;
  }
  for (const Read& read : spec.reads) {
    if (read.last <= length)
      order_rows(spec, codes + read.first - 1, read.order, rows);
    else
      for (int32_t h = 0; h < heads; ++h) rows[h] = -1;
    rows += heads;
  }
}

}  // namespace prefixmem
