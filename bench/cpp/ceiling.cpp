// What the machine does at best with the same rows: loops that read, or read and write, rows in a given order and do
// nothing else, fetching some rows ahead.
#include <cstdint>

#include "threads.h"

namespace {

constexpr int64_t LINE = 64;

template <bool WRITE> void visit(char* table, const int64_t* rows, int64_t first, int64_t last, int64_t bytes, int64_t ahead) {
  static volatile uint64_t zero = 0;  // of which the compiler knows nothing
  const uint64_t nothing = zero;
  uint64_t sum = 0;
  for (int64_t i = first; i < last; ++i) {
    const char* coming = table + rows[i + ahead < last ? i + ahead : last - 1] * bytes;
    for (int64_t b = 0; b < bytes; b += LINE) __builtin_prefetch(coming + b, WRITE);
    auto* row = reinterpret_cast<uint64_t*>(table + rows[i] * bytes);
    for (int64_t k = 0; k < bytes / 8; ++k) {
      if (WRITE)
        row[k] ^= nothing;
      else
        sum += row[k];
    }
  }
  volatile uint64_t kept = sum;
  (void)kept;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void share_threads(void* openmp) { prefixmem::use_openmp(reinterpret_cast<prefixmem::OpenMP>(openmp)); }

void visit_rows(char* table, const int64_t* rows, int64_t count, int64_t bytes, int64_t write, int64_t ahead,
                int64_t threads) {
  const int64_t chunk = 1024, chunks = (count + chunk - 1) / chunk;
  prefixmem::parallel(chunks, int(threads), [&](int64_t c) {
    const int64_t last = (c + 1) * chunk < count ? (c + 1) * chunk : count;
    (write ? visit<true> : visit<false>)(table, rows, c * chunk, last, bytes, ahead);
  });
}

}
#pragma GCC visibility pop
