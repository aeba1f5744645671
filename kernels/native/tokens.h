// Semantic IDs in a token stream: a token of level l belongs to one where the l - 1 tokens before it have the levels
// 1 .. l - 1 in that order, in the same row and, where segments are given, in the same segment. A window of two items
// needs the tokens of both, and of the items between, directly one after the other.
#pragma once
#include <cstdint>
#include <vector>

#include "memory.h"
#include "spec.h"

namespace prefixmem {

struct TokenTable {
  const int32_t* entries;  // [V, 2], level and code
  int64_t vocabulary;

  // Level and code of a token; 0 and 0 for text.
  void read(int64_t id, int32_t levels, int64_t& level, int64_t& code) const {
    level = code = 0;
    if (id < 0 || id >= vocabulary) return;
    level = entries[2 * id];
    code = entries[2 * id + 1];
    if (level < 0 || level > levels) level = 0;
  }
};

struct TokenStream {
  Integers ids, segments;  // [rows, length]; no segments where rows are not packed
  TokenTable table;
  int64_t rows, length;
};

// The Semantic IDs of a batch, or the windows of two, wherever they stand: codes [M, L], or found in a token stream.
struct Sids {
  Integers codes;            // [M, L]
  int64_t count = 0;         // M
  Array<int64_t> found;      // the codes of a token stream
  Array<int64_t> place;      // [M]: the token of level l stands at place + l - 1 of the flattened stream
  Array<int32_t> tokens;     // [M], the last level of which there is a token; no array where codes were given: all L
  int64_t places = 0;        // tokens of the stream

  bool in_stream() const { return tokens.size() > 0 || places > 0; }
  int32_t tokens_of(int64_t sid, int32_t levels) const { return in_stream() ? tokens[sid] : levels; }
};

Sids find_sids(const TokenStream& stream, const Spec& spec);

}  // namespace prefixmem
