// What native.cpp offers, by mode and dtype.
#pragma once
#include <memory>
#include <numeric>
#include <vector>

#include "forward.h"
#include "last_tokens.h"
#include "prefix_sums.h"
#include "update.h"
#include "windows.h"

namespace prefixmem {

// The rows that the gradient of a batch touches.
struct Plan {
  const Spec* spec;
  Sids sids;
  int threads = 1;
  std::unique_ptr<Prefixes> prefixes;  // of prefix and full mode
  std::unique_ptr<Windows> windows;    // of suffix mode
};

// Sums [rows, w] of a dtype, or an update.
struct Target {
  void* sums;
  DType dtype;
  const UpdateNumbers* update;
};

// SIDs up to which one thread updates alone: two gain little, and beside a busy process they wait for each other.
constexpr int64_t ALONE = 2048;
constexpr int64_t FEW_ROWS = 2048;  // that one thread reads before a second one would be awake

template <class F> INLINE void with_rows(const Table& table, F&& f) {
  switch (table.dtype) {
    case FLOAT32: return f(Plain<float>(table), float());
    case FLOAT64: return f(Plain<double>(table), double());
    case BFLOAT16: return f(Plain<BFloat16>(table), BFloat16());
    case FLOAT16: return f(Plain<Float16>(table), Float16());
    case INT8:
      if (table.out == BFLOAT16) return f(Scaled<Int8>(table), BFloat16());
      if (table.out == FLOAT16) return f(Scaled<Int8>(table), Float16());
      return f(Scaled<Int8>(table), float());
    case FLOAT8:
      if (table.out == BFLOAT16) return f(Scaled<Float8>(table), BFloat16());
      if (table.out == FLOAT16) return f(Scaled<Float8>(table), Float16());
      return f(Scaled<Float8>(table), float());
  }
}

inline void all_rows(const Spec& spec, const Integers& codes, int64_t sids, int64_t* out, int threads) {
  const int64_t each = int64_t(spec.orders) * spec.heads, chunk = 64;
  parallel((sids + chunk - 1) / chunk, sids * spec.levels * each > 16384 ? threads : 1, [&](int64_t c) {
    std::vector<int64_t> sid(spec.levels);
    for (int64_t m = c * chunk; m < std::min(c * chunk + chunk, sids); ++m) {
      const int32_t length = read_codes(spec, codes, m, sid.data());
      int64_t* rows = out + m * spec.levels * each;
      for (int64_t i = 0; i < spec.levels * each; ++i) rows[i] = -1;
      rows += (spec.begin() - 1) * each;
      for (int32_t level = spec.begin(); level <= spec.levels; ++level, rows += each)
        for (int32_t n = spec.mode == FULL ? level : 1; n <= std::min(level, spec.orders); ++n) {
          const int32_t first = spec.mode == SUFFIX ? level - n : 0;
          if (first + n <= length) order_rows(spec, sid.data() + first, n, rows + (n - 1) * spec.heads);
        }
    }
  });
}

inline void forward(const Table& table, const Spec& spec, const Sids& sids, void* out, int threads) {
  const int64_t chunks = std::max<int64_t>(1, (sids.count + SIDS_A_CHUNK - 1) / SIDS_A_CHUNK);
  const int used = sids.count * spec.rows_a_sid() > FEW_ROWS ? threads : 1;
  with_rows(table, [&](auto rows, auto number) {
    parallel(chunks, used, [&](int64_t chunk) {
      forward_chunk<decltype(rows), decltype(number)>(table, spec, sids, out, chunk);
    });
  });
}

inline void last_tokens(const Table& table, const Spec& spec, const TokenWindows& windows, void* out, int threads) {
  const int64_t chunks = (windows.count + WINDOWS_A_CHUNK - 1) / WINDOWS_A_CHUNK;
  with_rows(table, [&](auto rows, auto number) {
    parallel(chunks, windows.count * spec.rows_a_sid() > FEW_ROWS ? threads : 1, [&](int64_t chunk) {
      windows_chunk<decltype(rows), decltype(number)>(table, spec, windows, out, chunk);
    });
  });
}

inline void find_rows(Plan& plan) {
  if (plan.spec->mode == SUFFIX)
    plan.windows = std::make_unique<Windows>(find_windows(*plan.spec, plan.sids, plan.threads));
  else
    plan.prefixes = std::make_unique<Prefixes>(find_prefixes(*plan.spec, plan.sids, plan.threads));
}

// Counts the touched rows; with `out`, writes them there in ascending order and makes their places the targets.
inline int64_t number(Plan& plan, int64_t* out) {
  int64_t count = 0;
  if (plan.windows) {
    for (TableEntries& table : plan.windows->tables)  // their rows ascend, and so do those of the tables
      for (int64_t& target : table.targets) {
        if (out != nullptr) target = (out[count] = target, count);
        ++count;
      }
    return count;
  }
  Prefixes& p = *plan.prefixes;
  const int32_t heads = p.spec->heads;
  for (int64_t t = 0; t < int64_t(p.last) * heads; ++t) {
    const int64_t prefixes = p.prefixes(int32_t(t / heads) + 1), offset = p.spec->offsets[t];
    int64_t* targets = p.targets[t / heads].data() + t % heads;
    std::vector<SharedRow>& shared = p.shared[t];
    if (out == nullptr) {
      for (int64_t u = 0; u < prefixes; ++u) count += targets[u * heads] >= 0;
      count += int64_t(shared.size());
      continue;
    }
    Array<Entry> rows(prefixes), spare(prefixes);  // a shared row has two prefixes at least
    int64_t found = 0;
    for (int64_t u = 0; u < prefixes; ++u)
      if (targets[u * heads] >= 0) rows[found++] = {uint64_t(targets[u * heads] - offset), uint32_t(u)};
    const int64_t direct = found;
    for (size_t i = 0; i < shared.size(); ++i) rows[found++] = {uint64_t(shared[i].target - offset), uint32_t(i)};
    // Ranks of all rows; which of the two kinds an entry is shows in its target, still that row or not.
    const int bits = bits_needed(uint64_t(std::max<int64_t>(p.spec->rows[t / heads], 1) - 1));
    for (int64_t i = direct; i < found; ++i) rows[i].key |= uint64_t(1) << 63;
    Entry* sorted = sort_entries(rows.data(), spare.data(), found, bits);
    for (int64_t i = 0; i < found; ++i, ++count) {
      out[count] = offset + int64_t(sorted[i].key & ~(uint64_t(1) << 63));
      if (sorted[i].key >> 63)
        shared[sorted[i].item].target = count;
      else
        targets[int64_t(sorted[i].item) * heads] = count;
    }
  }
  return count;
}

template <class F> INLINE double with_destination(const Target& target, DType dtype, int64_t width, F&& f) {
  if (target.update != nullptr) switch (target.update->dtype) {
      case FLOAT64: return f(Update<double, double>(*target.update));
      case BFLOAT16: return f(Update<float, BFloat16>(*target.update));
      case FLOAT16: return f(Update<float, Float16>(*target.update));
      default: return f(Update<float, float>(*target.update));
    }
  if (dtype == FLOAT64) switch (target.dtype) {
      case FLOAT64: return f(Sums<double, double>(target.sums, width));
      default: return f(Sums<double, float>(target.sums, width));
    }
  switch (target.dtype) {
    case FLOAT64: return f(Sums<float, double>(target.sums, width));
    case BFLOAT16: return f(Sums<float, BFloat16>(target.sums, width));
    case FLOAT16: return f(Sums<float, Float16>(target.sums, width));
    default: return f(Sums<float, float>(target.sums, width));
  }
}

template <class A> double sum_into(const Plan& plan, const Gradient& grad, const Destination<A>& destination) {
  if (plan.windows) return sum_windows(*plan.windows, grad, destination);
  return PrefixSums<A>(*plan.prefixes, grad, destination).run();
}

inline double sum(const Plan& plan, const Gradient& grad, const Target& target) {
  return with_destination(target, grad.dtype, grad.width / plan.spec->heads, [&](const auto& destination) {
    return sum_into(plan, grad, destination);
  });
}

// Entries of one row, of 0 .. table_rows - 1, are added in their order.
inline double sum_sparse(const int64_t* rows, int64_t entries, int64_t table_rows, int64_t width, const void* values,
                         DType dtype, const Target& target, int threads) {
  TableEntries table;
  bool ascending = true;
  Array<Entry> unsorted(entries);
  for (int64_t i = 0; i < entries; ++i) {
    unsorted[i] = {uint64_t(rows[i]), uint32_t(i)};
    ascending &= i == 0 || rows[i] >= rows[i - 1];
  }
  group_by_row(table, std::move(unsorted), entries, ascending ? 0 : bits_needed(uint64_t(table_rows)), 0);
  const int64_t distinct = int64_t(table.targets.size()), chunk = 256, chunks = (distinct + chunk - 1) / chunk;
  auto vector = [&](uint32_t item) { return static_cast<const char*>(values) + int64_t(item) * width * bytes_of(dtype); };
  return with_destination(target, dtype, width, [&](const auto& destination) {
    std::vector<double> squares(chunks, 0.0);
    parallel(chunks, distinct > FEW_ROWS / 4 ? threads : 1, [&](int64_t c) {
      squares[c] = sum_table(table, dtype, width, destination, vector, c * chunk, std::min((c + 1) * chunk, distinct));
    });
    return std::accumulate(squares.begin(), squares.end(), 0.0);
  });
}

}  // namespace prefixmem
