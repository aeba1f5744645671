// The gradient of rows that are not of nested prefixes: suffix mode, where every level feeds rows of its own, and the
// entries of a sparse gradient. The entries are sorted by row, and each row adds its vectors in their order.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "destination.h"
#include "prefixes.h"

namespace prefixmem {

// The rows of one order and head that a batch touches.
struct TableEntries {
  Array<Entry> sorted;                   // by row; `item` is (SID, active level) or the entry of a sparse gradient
  int64_t count = 0;                     // entries; the array may be longer
  std::vector<int64_t> firsts, targets;  // of each distinct row: its first entry, and where its sum goes
  int64_t end(size_t row) const { return row + 1 < firsts.size() ? firsts[row + 1] : count; }
};

struct Windows {
  const Spec* spec;
  const Sids* sids;
  int threads;
  std::vector<TableEntries> tables;  // [orders * H]
};

INLINE void group_by_row(TableEntries& table, Array<Entry>&& entries, int64_t count, int bits, int64_t offset) {
  Array<Entry> spare(count);
  if (sort_entries(entries.data(), spare.data(), count, bits) != entries.data()) std::swap(entries, spare);
  for (int64_t i = 0; i < count; ++i)
    if (i == 0 || entries[i].key != entries[i - 1].key) {
      table.firsts.push_back(i);
      table.targets.push_back(offset + int64_t(entries[i].key));
    }
  table.sorted = std::move(entries), table.count = count;
}

INLINE Windows find_windows(const Spec& spec, const Sids& sids, int threads) {
  Windows windows{&spec, &sids, threads, {}};
  const int64_t actives = int64_t(spec.active.size());
  windows.tables.resize(spec.orders * spec.heads);
  parallel(spec.orders, windows.threads, [&](int64_t n) {
    const int32_t order = int32_t(n) + 1;
    std::vector<Array<Entry>> entries;
    for (int32_t h = 0; h < spec.heads; ++h) entries.emplace_back(sids.count * actives);
    std::vector<int64_t> codes(spec.levels), rows(spec.heads);
    int64_t count = 0;
    for (int64_t sid = 0; sid < sids.count; ++sid) {
      const int32_t length = std::min(read_codes(spec, sids.codes, sid, codes.data()), sids.tokens_of(sid, spec.levels));
      for (int64_t a = 0; a < actives; ++a) {
        const int32_t level = spec.active[a].level;
        if (level < order || level > length) continue;
        order_rows(spec, codes.data() + level - order, order, rows.data());
        for (int32_t h = 0; h < spec.heads; ++h) {
          const int64_t offset = spec.offsets[n * spec.heads + h];
          entries[h][count] = {uint64_t(rows[h] - offset), uint32_t(sid * actives + a)};
        }
        ++count;
      }
    }
    for (int32_t h = 0; h < spec.heads; ++h)
      group_by_row(windows.tables[n * spec.heads + h], std::move(entries[h]), count,
                   bits_needed(uint64_t(std::max<int64_t>(spec.rows[n], 1) - 1)),
                   spec.offsets[n * spec.heads + h]);
  });
  return windows;
}

// Sums vectors [.., w] over the entries of each row of a table; `vector(item)` gives the address of one.
template <class A, class Vector>
double sum_table(const TableEntries& table, DType dtype, int64_t width, const Destination<A>& destination, Vector vector,
                 size_t first, size_t last) {
  constexpr int64_t AHEAD = 8;
  std::vector<A> sum(width, A(0));
  double squares = 0;
  for (size_t row = first; row < last; ++row) {
    if (row + AHEAD < last) destination.fetch(table.targets[row + AHEAD]);
    uint8_t held = 0;
    for (int64_t i = table.firsts[row]; i < table.end(row); ++i) {
      if (i + AHEAD < table.count) prefetch(vector(table.sorted[i + AHEAD].item), width * bytes_of(dtype));
      add_vector(sum.data(), held, vector(table.sorted[i].item), dtype, width);
    }
    destination.put(table.targets[row], sum.data(), width, squares);
  }
  return squares;
}

template <class A> double sum_windows(const Windows& windows, const Gradient& grad, const Destination<A>& destination) {
  const Spec& spec = *windows.spec;
  const Sids& sids = *windows.sids;
  const int64_t actives = int64_t(spec.active.size()), width = grad.width / spec.heads, bytes = bytes_of(grad.dtype);
  std::vector<double> squares(windows.tables.size(), 0.0);
  parallel(int64_t(windows.tables.size()), windows.threads, [&](int64_t t) {
    const int64_t column = t % spec.heads * width;
    auto vector = [&](uint32_t item) {
      int64_t place = item;
      if (sids.in_stream()) place = sids.place[item / actives] + spec.active[item % actives].level - 1;
      return static_cast<const char*>(grad.data) + (place * grad.width + column) * bytes;
    };
    const TableEntries& table = windows.tables[t];
    squares[t] = sum_table(table, grad.dtype, width, destination, vector, 0, table.targets.size());
  });
  return std::accumulate(squares.begin(), squares.end(), 0.0);
}

}  // namespace prefixmem
