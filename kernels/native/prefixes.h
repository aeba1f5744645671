// The distinct prefixes of a batch, order by order, and the rows that several of them share.
//
// Sorted by their codes, the SIDs of every prefix of every order stand side by side, so that one sort serves all orders.
// A hashed row that several prefixes share is found by a filter of bits: a prefix whose bit no other one sets is alone.
#pragma once
#include <algorithm>
#include <vector>

#include "numbers.h"
#include "sorting.h"
#include "spec.h"
#include "threads.h"
#include "tokens.h"

namespace prefixmem {

constexpr int64_t SIDS_A_BLOCK = 256;  // a constant: sums are added in the same order whatever the number of threads

// What several prefixes of one order and head add to: their sums go aside first, those of a row side by side.
struct SharedRow {
  int64_t target;
  int64_t first, count;  // slots
};

struct Prefixes {
  const Spec* spec;
  const Sids* sids;
  int threads;
  int32_t last;                          // orders that have a gradient: 1 .. last
  int64_t blocks;
  Array<Entry> sorted;                   // [M], `item` is the SID
  Array<int32_t> reach;                  // [M] by SID: its orders that have rows
  Array<int32_t> equal;                  // [M + 1]: codes that a sorted SID has in common with the one before, from the left
  std::vector<int64_t> starts;           // [blocks + 1, last]: prefixes of each order that begin before a block
  std::vector<Array<int64_t>> targets;   // [last] of [prefixes, H]: the row; -1 for none, -2 - slot where it is shared
  std::vector<std::vector<SharedRow>> shared;  // [last * H]
  int64_t slots = 0;

  int64_t prefixes(int32_t order) const { return starts[blocks * last + order - 1]; }
  int64_t started(int64_t block, int32_t order) const { return starts[block * last + order - 1]; }
  int64_t first(int64_t block) const { return block * SIDS_A_BLOCK; }
  int64_t end(int64_t block) const { return std::min(first(block) + SIDS_A_BLOCK, sids->count); }
  // Whether a block begins inside a prefix of this order.
  bool continued(int64_t block, int32_t order) const { return equal[first_or_end(block)] >= order; }

 private:
  int64_t first_or_end(int64_t block) const { return std::min(first(block), sids->count); }
};

INLINE int32_t reach_of(const Spec& spec, const Sids& sids, int64_t sid, int64_t* codes) {
  int32_t upto = 0;  // the last level that a token has and that is read
  for (const ActiveLevel& level : spec.active)
    if (level.level <= sids.tokens_of(sid, spec.levels)) upto = level.level;
  return std::min({read_codes(spec, sids.codes, sid, codes), upto, spec.last_order});
}

// Sorts SIDs by their first `last` codes, 0 from the end of the prefix on; as many words of 64 bits as hold them.
INLINE void sort_sids(Prefixes& p) {
  const Spec& spec = *p.spec;
  const int64_t count = p.sids->count, blocks = p.blocks;
  Array<Entry> entries(count), spare(count);
  for (int64_t i = 0; i < count; ++i) entries[i].item = uint32_t(i);
  for (int32_t upper = p.last; upper > 0;) {
    int32_t lower = upper;
    int bits = 0;
    while (lower > 0 && bits + bits_needed(uint64_t(spec.sizes[lower - 1])) <= 64)
      bits += bits_needed(uint64_t(spec.sizes[--lower]));
    parallel(blocks, p.threads, [&](int64_t block) {
      for (int64_t i = p.first(block); i < p.end(block); ++i) {
        uint64_t key = 0;
        const int64_t sid = entries[i].item;
        for (int32_t l = lower; l < upper; ++l) {
          uint64_t code = l < p.reach[sid] ? uint64_t(p.sids->codes.at(sid * spec.levels + l)) + 1 : 0;
          const int size = bits_needed(uint64_t(spec.sizes[l]));
          key = size < 64 ? key << size | code : code;
        }
        entries[i].key = key;
      }
    });
    if (sort_entries(entries.data(), spare.data(), count, bits) != entries.data()) std::swap(entries, spare);
    upper = lower;
  }
  p.sorted = std::move(entries);
}

// Codes that two SIDs have in common from the left, of the first `last`.
INLINE int32_t common_codes(const Prefixes& p, int64_t a, int64_t b) {
  const int32_t reach_a = p.reach[a], reach_b = p.reach[b], levels = p.spec->levels, both = std::min(reach_a, reach_b);
  for (int32_t l = 0; l < both; ++l)
    if (p.sids->codes.at(a * levels + l) != p.sids->codes.at(b * levels + l)) return l;
  return reach_a == reach_b ? p.last : both;
}

// Finds prefixes of one order and head with the same row, and gives each a slot; returns how many slots.
INLINE int64_t find_shared(Prefixes& p, int32_t order, int32_t head, Array<Entry>& claims) {
  const int64_t count = p.prefixes(order);
  const int32_t heads = p.spec->heads;
  if (count < 2) return 0;
  int64_t* targets = p.targets[order - 1].data() + head;
  const int64_t offset = p.spec->offsets[(order - 1) * heads + head];
  uint64_t bits = 1024;
  while (bits < uint64_t(count) * 8) bits *= 2;
  Array<uint64_t> filter(int64_t(bits / 32));  // two bits a place: claimed, and claimed again
  std::memset(filter.data(), 0, bits / 4);
  uint64_t* again = filter.data() + bits / 64;
  for (int64_t u = 0; u < count; ++u) {
    const int64_t row = targets[u * heads];
    if (row < 0) continue;
    const uint64_t place = uint64_t(row - offset) & (bits - 1), bit = uint64_t(1) << (place & 63);
    again[place >> 6] |= filter[place >> 6] & bit;
    filter[place >> 6] |= bit;
  }
  claims = Array<Entry>(count);
  int64_t claimed = 0;
  for (int64_t u = 0; u < count; ++u) {
    const int64_t row = targets[u * heads];
    if (row < 0) continue;
    const uint64_t place = uint64_t(row - offset) & (bits - 1);
    if (again[place >> 6] >> (place & 63) & 1) claims[claimed++] = {uint64_t(row - offset), uint32_t(u)};
  }
  Array<Entry> spare(claimed);
  const int key_bits = bits_needed(uint64_t(p.spec->rows[order - 1] - 1));
  if (sort_entries(claims.data(), spare.data(), claimed, key_bits) != claims.data()) std::swap(claims, spare);
  std::vector<SharedRow>& rows = p.shared[(order - 1) * heads + head];
  int64_t kept = 0;
  for (int64_t i = 0, j; i < claimed; i = j) {
    for (j = i + 1; j < claimed && claims[j].key == claims[i].key;) ++j;
    if (j == i + 1) continue;
    rows.push_back({offset + int64_t(claims[i].key), kept, j - i});
    for (int64_t k = i; k < j; ++k) claims[kept++] = claims[k];
  }
  return kept;
}

INLINE void share_rows(Prefixes& p) {
  const int32_t heads = p.spec->heads;
  const int64_t tables = int64_t(p.last) * heads;
  p.shared.resize(tables);
  std::vector<Array<Entry>> claims(tables);
  std::vector<int64_t> slots(tables, 0);
  parallel(tables, p.threads, [&](int64_t table) {
    const int32_t order = int32_t(table / heads) + 1;
    if (!p.spec->exact[order - 1])
      slots[table] = find_shared(p, order, int32_t(table % heads), claims[table]);
  });
  const std::vector<int64_t> counts = slots;
  for (int64_t table = 0; table < tables; ++table) {
    const int64_t base = p.slots;
    p.slots += slots[table];
    slots[table] = base;
  }
  parallel(tables, p.threads, [&](int64_t table) {
    int64_t* targets = p.targets[table / heads].data() + table % heads;
    int64_t slot = slots[table];
    for (SharedRow& row : p.shared[table]) row.first += slot;
    for (int64_t i = 0; i < counts[table]; ++i) targets[int64_t(claims[table][i].item) * heads] = -2 - slot++;
  });
}

INLINE Prefixes find_prefixes(const Spec& spec, const Sids& sids, int threads) {
  Prefixes p{};
  p.spec = &spec, p.sids = &sids, p.last = spec.last_order, p.threads = threads;
  p.blocks = (sids.count + SIDS_A_BLOCK - 1) / SIDS_A_BLOCK;
  p.reach = Array<int32_t>(sids.count);
  parallel(p.blocks, p.threads, [&](int64_t block) {
    std::vector<int64_t> codes(spec.levels);
    for (int64_t sid = p.first(block); sid < p.end(block); ++sid)
      p.reach[sid] = reach_of(spec, sids, sid, codes.data());
  });
  sort_sids(p);
  p.equal = Array<int32_t>(sids.count + 1);
  p.equal[sids.count] = 0;
  std::vector<int64_t> begun(p.blocks * p.last, 0);
  parallel(p.blocks, p.threads, [&](int64_t block) {
    for (int64_t i = p.first(block); i < p.end(block); ++i) {
      const int32_t same = i == 0 ? 0 : common_codes(p, p.sorted[i - 1].item, p.sorted[i].item);
      p.equal[i] = same;
      for (int32_t n = same; n < p.last; ++n) ++begun[block * p.last + n];
    }
  });
  p.starts.resize((p.blocks + 1) * p.last, 0);
  for (size_t i = 0; i < begun.size(); ++i) p.starts[i + p.last] = p.starts[i] + begun[i];
  std::vector<int64_t*> places;
  std::vector<uint8_t> read(p.last, 0);
  for (const Read& r : spec.reads) read[r.order - 1] = 1;
  for (int32_t n = 1; n <= p.last; ++n) {
    p.targets.emplace_back(p.prefixes(n) * spec.heads);
    places.push_back(p.targets.back().data());
  }
  parallel(p.blocks, p.threads, [&](int64_t block) {
    std::vector<int64_t> next(p.starts.begin() + block * p.last, p.starts.begin() + (block + 1) * p.last);
    std::vector<int64_t> codes(spec.levels);
    for (int64_t i = p.first(block); i < p.end(block); ++i) {
      if (p.equal[i] == p.last) continue;
      const int64_t sid = p.sorted[i].item;
      read_codes(spec, sids.codes, sid, codes.data());
      const int32_t heads = spec.heads, first = p.equal[i] + 1, reach = p.reach[sid];
      for (int32_t n = first; n <= p.last; ++n) {
        int64_t* rows = places[n - 1] + next[n - 1]++ * heads;
        if (n > reach || !read[n - 1])
          for (int32_t h = 0; h < heads; ++h) rows[h] = -1;
      }
      all_nested_rows(spec, codes.data(), reach, [&](int32_t n, int32_t head, const int64_t* found, int32_t count) {
        if (n < first || !read[n - 1]) return;
        int64_t* rows = places[n - 1] + (next[n - 1] - 1) * heads + head;
        for (int32_t h = 0; h < count; ++h) rows[h] = found[h];
      });
    }
  });
  share_rows(p);
  return p;
}

}  // namespace prefixmem
