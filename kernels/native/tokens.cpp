#include "tokens.h"

#include <algorithm>

namespace prefixmem {

Sids find_sids(const TokenStream& stream, const Spec& spec) {
  Sids sids;
  sids.places = stream.rows * stream.length;
  int64_t most = 0, level, code;
  for (int64_t i = 0; i < sids.places; ++i) {
    stream.table.read(stream.ids.at(i), spec.item_levels, level, code);
    most += level == 1;
  }
  sids.found = Array<int64_t>(most * spec.levels);
  sids.place = Array<int64_t>(most);
  sids.tokens = Array<int32_t>(most);
  sids.count = most;
  sids.codes = {sids.found.data(), 8};
  // A token of level 1 begins a window, while those of the items before it go on.
  const int64_t L = spec.item_levels, live = (spec.levels + spec.gap) / L;  // windows at a time
  int64_t sid = -1;
  for (int64_t row = 0; row < stream.rows; ++row) {
    int64_t under_way = 0;     // level of the token before, 0 after text
    int64_t oldest = sid + 1;  // window of the first of the items that stand directly one after the other
    for (int64_t i = row * stream.length; i < (row + 1) * stream.length; ++i) {
      stream.table.read(stream.ids.at(i), spec.item_levels, level, code);
      bool follows = under_way > 0 && level == (under_way < L ? under_way + 1 : 1);
      if (follows && stream.segments.data != nullptr) follows = stream.segments.at(i) == stream.segments.at(i - 1);
      if (level == 1 && sid + 1 == most) return sids;  // another thread writes the ids meanwhile
      if (level == 1) {
        sids.place[++sid] = i + spec.gap;
        for (int32_t l = 0; l < spec.levels; ++l) sids.found[sid * spec.levels + l] = -1;
        if (!follows) oldest = sid;
      }
      under_way = level == 1 || follows ? level : 0;
      if (under_way == 0) oldest = sid + 1;
      for (int64_t window = std::max(oldest, sid + 1 - live); window <= sid; ++window) {
        const int64_t after_gap = i - sids.place[window] + 1, tokens = after_gap + spec.gap;
        sids.tokens[window] = int32_t(std::max<int64_t>(after_gap, 0));
        if (tokens <= L || after_gap > L) sids.found[window * spec.levels + (tokens <= L ? tokens : after_gap) - 1] = code;
      }
    }
  }
  sids.count = std::min(sid + 1, most);
  return sids;
}

}  // namespace prefixmem
