#include "tokens.h"

#include <algorithm>

namespace prefixmem {

Sids find_sids(const TokenStream& stream, const Spec& spec) {
  Sids sids;
  sids.places = stream.rows * stream.length;
  int64_t most = 0, level, code;
  for (int64_t i = 0; i < sids.places; ++i) {
    stream.table.read(stream.ids.at(i), spec.levels, level, code);
    most += level == 1;
  }
  sids.found = Array<int64_t>(most * spec.levels);
  sids.place = Array<int64_t>(most);
  sids.tokens = Array<int32_t>(most);
  sids.count = most;
  sids.codes = {sids.found.data(), 8};
  int64_t sid = -1;
  for (int64_t row = 0; row < stream.rows; ++row) {
    int64_t under_way = 0;  // level of the token before, 0 after text
    for (int64_t i = row * stream.length; i < (row + 1) * stream.length; ++i) {
      stream.table.read(stream.ids.at(i), spec.levels, level, code);
      bool follows = under_way > 0 && level == under_way + 1;
      if (follows && stream.segments.data != nullptr) follows = stream.segments.at(i) == stream.segments.at(i - 1);
      if (level == 1 && sid + 1 == most) return sids;  // another thread writes the ids meanwhile
      if (level == 1) {
        sids.place[++sid] = i;
        for (int32_t l = 0; l < spec.levels; ++l) sids.found[sid * spec.levels + l] = -1;
      }
      under_way = level == 1 || follows ? level : 0;
      if (under_way > 0) {
        sids.found[sid * spec.levels + under_way - 1] = code;
        sids.tokens[sid] = int32_t(under_way);
      }
    }
  }
  sids.count = std::min(sid + 1, most);
  return sids;
}

}  // namespace prefixmem
