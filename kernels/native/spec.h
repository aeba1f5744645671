// Where the rows of a Semantic ID are: the address spec, and rows from codes.
//
//   hashed order:  row = offset[n, h] + ( XOR_i c_i * p[i, h] ) mod T_n
//   exact order:   row = offset[n, h] + ( .. (c_1 * K_2 + c_2) * K_3 + .. ) * K_n + c_n
//
// Orders and levels count from 1, as in the paper; arrays of them have no place 0.
#pragma once
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
  int32_t levels, orders, heads, mode;
  bool narrow;  // hashes and moduli fit 32 bits
  std::vector<int64_t> sizes, multipliers, rows, offsets;  // [L], [N * H], [N], [N * H]
  std::vector<uint8_t> exact;                              // [N]
  std::vector<uint64_t> reciprocals;                       // [N], of the moduli: ceil(2^64 / T)
  std::vector<ActiveLevel> active;
  std::vector<Read> reads;  // in the order in which a SID adds them
  int32_t last_order = 0;   // the last that an active level reads

  int64_t rows_a_sid() const { return int64_t(reads.size()) * heads; }
};

// Codes [M, L] of 2, 4 or 8 bytes.
struct Codes {
  const void* data;
  int32_t bytes;

  int64_t at(int64_t i) const {
    if (bytes == 8) return static_cast<const int64_t*>(data)[i];
    return bytes == 4 ? static_cast<const int32_t*>(data)[i] : static_cast<const int16_t*>(data)[i];
  }
};

// Reads a SID; returns how many of its codes stand before one that ends the prefix.
INLINE int32_t read_codes(const Spec& spec, const Codes& codes, int64_t sid, int64_t* out) {
  int32_t length = 0;
  while (length < spec.levels) {
    int64_t code = codes.at(sid * spec.levels + length);
    if (code < 0 || code >= spec.sizes[length]) break;
    out[length++] = code;
  }
  return length;
}

// x mod T_n. Below 2^32: Lemire, Kaser and Kurz, "Faster remainder by direct computation", 2019.
INLINE uint64_t modulo(const Spec& spec, int32_t order, uint64_t x) {
  uint64_t rows = uint64_t(spec.rows[order - 1]);
  if (!spec.narrow) return x % rows;
  uint64_t fraction = spec.reciprocals[order - 1] * x;
  return uint64_t((static_cast<unsigned __int128>(fraction) * rows) >> 64);
}

// Rows [H] of one order whose window begins at `window`.
INLINE void order_rows(const Spec& spec, const int64_t* window, int32_t order, int64_t* rows) {
  const int64_t* offsets = &spec.offsets[(order - 1) * spec.heads];
  if (spec.exact[order - 1]) {
    int64_t index = 0;
    for (int32_t i = 0; i < order; ++i) index = index * spec.sizes[i] + window[i];
    for (int32_t h = 0; h < spec.heads; ++h) rows[h] = offsets[h] + index;
    return;
  }
  for (int32_t h = 0; h < spec.heads; ++h) {
    uint64_t hash = 0;
    for (int32_t i = 0; i < order; ++i) hash ^= uint64_t(window[i] * spec.multipliers[i * spec.heads + h]);
    rows[h] = offsets[h] + int64_t(modulo(spec, order, hash));
  }
}

// Rows [reads, H] of a SID with `length` codes; -1 for what does not exist.
INLINE void sid_rows(const Spec& spec, const int64_t* codes, int32_t length, int64_t* rows) {
  for (const Read& read : spec.reads) {
    if (read.last <= length)
      order_rows(spec, codes + read.first - 1, read.order, rows);
    else
      for (int32_t h = 0; h < spec.heads; ++h) rows[h] = -1;
    rows += spec.heads;
  }
}

}  // namespace prefixmem
