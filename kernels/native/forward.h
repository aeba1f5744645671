// S_a = sum over n <= min(a, N) of concat_h E[n, h][row(n, h)]: each row is read once a SID, the sum runs over levels.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "numbers.h"
#include "spec.h"
#include "streams.h"
#include "tokens.h"

namespace prefixmem {

struct Table {
  const void* rows;     // [R, w]
  const float* scales;  // [R] of quantized rows
  DType dtype, out;     // of the rows, and of S
  int64_t width;        // w
};

constexpr int64_t SIDS_A_CHUNK = 64;
constexpr int64_t ROWS_AHEAD = 48;  // rows on their way from memory; more change nothing

template <class T> struct Plain {
  const T* rows;
  int64_t width;
  explicit Plain(const Table& table) : rows(static_cast<const T*>(table.rows)), width(table.width) {}
  using Sum = Accumulator<T>;
  INLINE void fetch(int64_t row) const { prefetch(rows + row * width, width * int64_t(sizeof(T))); }
  INLINE void add_to(Sum* sum, int64_t row) const { add(sum, rows + row * width, width); }
};

template <class T> struct Scaled {
  const T* rows;
  const float* scales;
  int64_t width;
  explicit Scaled(const Table& table)
      : rows(static_cast<const T*>(table.rows)), scales(table.scales), width(table.width) {}
  using Sum = float;
  INLINE void fetch(int64_t row) const {
    prefetch(rows + row * width, width);
    __builtin_prefetch(scales + row);
  }
  INLINE void add_to(Sum* sum, int64_t row) const { add_scaled(sum, rows + row * width, scales[row], width); }
};

// Adds the reads of one level to `sum` [H, w]; in prefix mode it holds the level before. For each row that is added one of
// `coming` is fetched: in one burst they would wait for one another.
template <class Rows, class Sum = typename Rows::Sum>
INLINE void add_level(const Rows& table, const Spec& spec, const ActiveLevel& level, const int64_t* rows,
                      const int64_t* coming, Sum* sum) {
  if (spec.mode != PREFIX) clear(sum, spec.heads * table.width);
  int64_t e = int64_t(level.first_read) * spec.heads;
  for (int32_t read = level.first_read; read < level.last_read; ++read)
    for (int32_t h = 0; h < spec.heads; ++h, ++e) {
      if (coming[e] >= 0) table.fetch(coming[e]);
      if (rows[e] >= 0) table.add_to(sum + h * table.width, rows[e]);
    }
}

// Writes levels of S in its dtype; past the caches where S is larger than they are.
template <class Out> struct Writer {
  int64_t width;  // H * w
  bool streamed;
  std::vector<Out> rounded;

  Writer(int64_t width, const void* out, int64_t out_bytes) : width(width) {
    int64_t bytes = width * int64_t(sizeof(Out));
    streamed = out_bytes >= STREAMED_BYTES && bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    rounded.resize(width);
  }

  template <class Sum> INLINE void write(Out* out, const Sum* sum) {
    if (!streamed) return round_into(out, sum, width);
    if constexpr (std::is_same_v<Out, Sum>) return stream(out, sum, width * int64_t(sizeof(Out)));
    round_into(rounded.data(), sum, width);
    stream(out, rounded.data(), width * int64_t(sizeof(Out)));
  }

  INLINE void zero(Out* out, int64_t vectors) { std::memset(static_cast<void*>(out), 0, vectors * width * sizeof(Out)); }
};

// Takes SIDs [first, last), computing rows some SIDs ahead: `visit(sid, rows, coming)` finds those of a SID in the cache,
// and fetches the other ones.
template <class Rows, class Visit>
INLINE void read_ahead(const Rows& table, const Spec& spec, const Sids& sids, int64_t first, int64_t last, Visit visit) {
  const int64_t each = spec.rows_a_sid();
  const int64_t ahead = std::max<int64_t>(1, std::min<int64_t>(32, ROWS_AHEAD / std::max<int64_t>(each, 1)));
  const int64_t places = ahead + 1;
  std::vector<int64_t> rows(places * each), codes(spec.levels);
  auto begin = [&](int64_t sid) {
    int64_t* mine = rows.data() + sid % places * each;
    if (sid >= last) return std::fill(mine, mine + each, -1), mine;
    int32_t length = read_codes(spec, sids.codes, sid, codes.data());
    sid_rows(spec, codes.data(), std::min(length, sids.tokens_of(sid, spec.levels)), mine);
    return mine;
  };
  for (int64_t sid = first; sid < first + ahead; ++sid) {
    const int64_t* mine = begin(sid);
    for (int64_t e = 0; e < each; ++e)
      if (mine[e] >= 0) table.fetch(mine[e]);
  }
  for (int64_t sid = first; sid < last; ++sid) {
    const int64_t* coming = begin(sid + ahead);
    visit(sid, rows.data() + sid % places * each, coming);
  }
}

// S [M, A, H * w] of the SIDs of one chunk, or [places, H * w] of their tokens and of the text up to the next.
template <class Rows, class Out> void forward_chunk(const Table& given, const Spec& spec, const Sids& sids, void* to, int64_t chunk) {
  using Sum = typename Rows::Sum;
  const Rows table(given);
  const int64_t width = spec.heads * given.width, actives = int64_t(spec.active.size());
  const int64_t first = chunk * SIDS_A_CHUNK, last = std::min(first + SIDS_A_CHUNK, sids.count);
  Out* out = static_cast<Out*>(to);
  int64_t vectors = sids.in_stream() ? sids.places : sids.count * actives;
  Writer<Out> writer(width, to, vectors * width * int64_t(sizeof(Out)));
  std::vector<Sum> sum(width);
  auto begin_of = [&](int64_t sid) {  // where the first level that may be read stands
    return sid < sids.count ? std::min(sids.place[sid] + spec.begin() - 1, sids.places) : sids.places;
  };
  int64_t written = chunk == 0 || !sids.in_stream() ? 0 : begin_of(first);
  read_ahead(table, spec, sids, first, last, [&](int64_t sid, const int64_t* rows, const int64_t* coming) {
    clear(sum.data(), width);
    for (int64_t a = 0; a < actives; ++a) {
      const ActiveLevel& level = spec.active[a];
      add_level(table, spec, level, rows, coming, sum.data());
      if (!sids.in_stream()) {
        writer.write(out + (sid * actives + a) * width, sum.data());
      } else if (level.level <= sids.tokens[sid]) {
        int64_t place = sids.place[sid] + level.level - 1;
        writer.zero(out + written * width, place - written);
        writer.write(out + place * width, sum.data());
        written = place + 1;
      }
    }
  });
  if (sids.in_stream()) {
    int64_t end = begin_of(last);
    writer.zero(out + written * width, end - written);
  }
  if (writer.streamed) end_streams();
}

}  // namespace prefixmem
