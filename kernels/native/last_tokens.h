// S of the last token of each of many windows of tokens: what a step of decoding reads.
#pragma once
#include <algorithm>
#include <vector>

#include "forward.h"

namespace prefixmem {

// Tokens [count, length], of rows `stride` apart.
struct TokenWindows {
  Integers ids;
  TokenTable table;
  int64_t count, length, stride;
};

constexpr int64_t WINDOWS_A_CHUNK = 16;

// The active level of the last token of a window, and the codes up to it; none where it is text or its SID is broken.
INLINE const ActiveLevel* last_token(const Spec& spec, const TokenWindows& windows, int64_t w, int64_t* codes) {
  const int64_t end = w * windows.stride + windows.length - 1, L = spec.item_levels;
  int64_t at, code;
  windows.table.read(windows.ids.at(end), int32_t(L), at, code);
  if (at == 0) return nullptr;
  const int64_t level = spec.levels > L ? L + at % L : at, tokens = level + spec.gap;
  auto wanted = std::find_if(spec.active.begin(), spec.active.end(), [&](auto& active) { return active.level == level; });
  if (wanted == spec.active.end() || tokens > windows.length) return nullptr;
  for (int64_t back = 0; back < tokens; ++back) {
    const int64_t position = tokens - back;  // from the first token of the earlier item
    windows.table.read(windows.ids.at(end - back), int32_t(L), at, code);
    if (at != (position - 1) % L + 1) return nullptr;
    if (position <= L) codes[position - 1] = code;
    if (position > L + spec.gap) codes[position - spec.gap - 1] = code;
  }
  return &*wanted;
}

template <class Rows, class Out>
void windows_chunk(const Table& given, const Spec& spec, const TokenWindows& windows, void* to, int64_t chunk) {
  using Sum = typename Rows::Sum;
  const Rows table(given);
  const int64_t width = spec.heads * given.width, each = spec.rows_a_sid(), heads = spec.heads;
  const int64_t first = chunk * WINDOWS_A_CHUNK, last = std::min(first + WINDOWS_A_CHUNK, windows.count);
  std::vector<int64_t> rows(WINDOWS_A_CHUNK * each), codes(spec.levels), valid(spec.levels);
  const ActiveLevel* levels[WINDOWS_A_CHUNK];
  // In prefix mode a sum holds the orders of all levels before.
  auto begin = [&](const ActiveLevel& level) { return spec.mode == PREFIX ? 0 : level.first_read * heads; };
  for (int64_t w = first; w < last; ++w) {
    std::fill(codes.begin(), codes.end(), -1);
    const ActiveLevel* level = levels[w - first] = last_token(spec, windows, w, codes.data());
    if (level == nullptr) continue;
    int64_t* mine = rows.data() + (w - first) * each;
    const int32_t length = read_codes(spec, {codes.data()}, 0, valid.data());
    sid_rows(spec, valid.data(), std::min(length, level->level), mine);
    for (int64_t e = begin(*level); e < level->last_read * heads; ++e)
      if (mine[e] >= 0) table.fetch(mine[e]);
  }
  std::vector<Sum> sum(width);
  for (int64_t w = first; w < last; ++w) {
    clear(sum.data(), width);
    const int64_t* mine = rows.data() + (w - first) * each;
    if (const ActiveLevel* level = levels[w - first])
      for (int64_t e = begin(*level); e < level->last_read * heads; ++e)
        if (mine[e] >= 0) table.add_to(sum.data() + e % heads * given.width, mine[e]);
    round_into(static_cast<Out*>(to) + w * width, sum.data(), width);
  }
}

}  // namespace prefixmem
