// One token of each sequence: within a SID S_l = S_{l-1} + e_l, so that a step reads the H rows of order l alone. The
// other modes sum the orders of a level anew.
#pragma once
#include <algorithm>
#include <vector>

#include "forward.h"

namespace prefixmem {

// Where each of B sequences stands within a SID.
struct PrefixState {
  int64_t* codes;  // [B, L], then -1
  int64_t* level;  // [B], 0 after text
  void* total;     // [B, H, w], S of that level, in the accumulator's dtype
};

constexpr int64_t SEQUENCES_A_CHUNK = 16;

// Moves a sequence on by one token; returns its level.
INLINE int64_t move_on(const Spec& spec, const TokenTable& tokens, int64_t id, int64_t* codes, int64_t& at) {
  int64_t level, code;
  tokens.read(id, spec.levels, level, code);
  at = level == 1 || level == at + 1 ? level : 0;
  if (at <= 1)
    for (int32_t l = 0; l < spec.levels; ++l) codes[l] = -1;
  if (at > 0) codes[at - 1] = code;
  return at;
}

// The orders [first, last] that a level adds to the sum before it.
INLINE void added_orders(const Spec& spec, int64_t level, int64_t& first, int64_t& last) {
  first = spec.mode == SUFFIX ? 1 : level;
  last = level > spec.orders && spec.mode != SUFFIX ? 0 : std::min<int64_t>(level, spec.orders);
}

template <class Rows, class Out>
void decoding_chunk(const Table& given, const Spec& spec, const TokenTable& tokens, const Integers& ids,
                    const PrefixState& state, void* to, int64_t chunk, int64_t sequences) {
  using Sum = typename Rows::Sum;
  const Rows table(given);
  const int64_t width = spec.heads * given.width;
  const int64_t first = chunk * SEQUENCES_A_CHUNK, last = std::min(first + SEQUENCES_A_CHUNK, sequences);
  const int64_t each = int64_t(spec.orders) * spec.heads;
  std::vector<int64_t> rows(SEQUENCES_A_CHUNK * each, -1), valid(spec.levels);
  for (int64_t b = first; b < last; ++b) {
    int64_t* codes = state.codes + b * spec.levels;
    int64_t level = move_on(spec, tokens, ids.at(b), codes, state.level[b]);
    int64_t from, upto;
    added_orders(spec, level, from, upto);
    if (level == 0 || read_codes(spec, {state.codes}, b, valid.data()) < level) continue;
    for (int64_t n = from; n <= upto; ++n) {
      int64_t* mine = rows.data() + (b - first) * each + (n - 1) * spec.heads;
      order_rows(spec, codes + (spec.mode == SUFFIX ? level - n : 0), int32_t(n), mine);
      for (int32_t h = 0; h < spec.heads; ++h) table.fetch(mine[h]);
    }
  }
  std::vector<Sum> nothing(width, Sum(0));
  for (int64_t b = first; b < last; ++b) {
    Sum* total = static_cast<Sum*>(state.total) + b * width;
    const int64_t* mine = rows.data() + (b - first) * each;
    int64_t level = state.level[b];
    if (level <= 1 || spec.mode != PREFIX) clear(total, width);
    for (int64_t e = 0; e < each; ++e)
      if (mine[e] >= 0) table.add_to(total + e % spec.heads * given.width, mine[e]);
    bool active = false;
    for (const ActiveLevel& wanted : spec.active) active |= wanted.level == level;
    round_into(static_cast<Out*>(to) + b * width, active ? total : nothing.data(), width);
  }
}

}  // namespace prefixmem
