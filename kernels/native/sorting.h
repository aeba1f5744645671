// Stable sorts of integers by the digits that they have, least significant first.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "memory.h"
#include "numbers.h"

namespace prefixmem {

struct Entry {
  uint64_t key;
  uint32_t item;
};

INLINE int bits_needed(uint64_t largest) {
  int bits = 0;
  while (bits < 64 && largest >> bits) ++bits;
  return bits;
}

// Sorts entries by the lowest `bits` bits of their keys; `spare` is as long. Returns where the result is.
inline Entry* sort_entries(Entry* entries, Entry* spare, int64_t count, int bits) {
  const int passes = (bits + 10) / 11;
  if (passes == 0 || count < 2) return entries;
  const int digit = (bits + passes - 1) / passes;
  if (count < 64) {  // insertion
    const uint64_t mask = bits >= 64 ? ~uint64_t(0) : (uint64_t(1) << bits) - 1;
    for (int64_t i = 1; i < count; ++i) {
      Entry moved = entries[i];
      int64_t j = i;
      for (; j > 0 && (entries[j - 1].key & mask) > (moved.key & mask); --j) entries[j] = entries[j - 1];
      entries[j] = moved;
    }
    return entries;
  }
  uint32_t places[1 << 11];
  const uint64_t mask = (uint64_t(1) << digit) - 1;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = pass * digit;
    std::memset(places, 0, sizeof(uint32_t) << digit);
    for (int64_t i = 0; i < count; ++i) ++places[entries[i].key >> shift & mask];
    uint32_t total = 0;
    for (int64_t d = 0; d <= int64_t(mask); ++d) total += std::exchange(places[d], total);
    for (int64_t i = 0; i < count; ++i) spare[places[entries[i].key >> shift & mask]++] = entries[i];
    std::swap(entries, spare);
  }
  return entries;
}

}  // namespace prefixmem
