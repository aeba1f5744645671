// The gradient of every row that prefixes touch, each gradient of S read once.
//
// A walk over the sorted SIDs keeps a sum for each order. Where a prefix ends, its sum is whole: it goes to its rows, is
// added to that of the order below, of which it is a part, and begins anew. Blocks of SIDs are walked by several
// threads; a prefix that goes on into the next block leaves what it has, and the pieces are added in their order.
#pragma once
#include <cstring>
#include <numeric>
#include <vector>

#include "destination.h"
#include "prefixes.h"

namespace prefixmem {
template <class A> class PrefixSums {
 public:
  PrefixSums(const Prefixes& p, const Gradient& grad, const Destination<A>& destination)
      : p_(p), spec_(*p.spec), grad_(grad), destination_(destination), width_(grad.width),
        row_width_(grad.width / p.spec->heads), nested_(p.spec->mode == PREFIX),
        aside_(p.slots * row_width_), pieces_(p.blocks * p.last * 2 * width_) {}

  // Returns the sum of the squares of all sums.
  double run() {
    const int64_t tables = int64_t(p_.last) * spec_.heads, phases = p_.blocks + p_.last + tables;
    std::vector<double> squares(phases, 0.0);
    parallel(p_.blocks, p_.threads, [&](int64_t block) { walk(block, squares[block]); });
    parallel(p_.last, p_.threads, [&](int64_t n) { join(int32_t(n) + 1, squares[p_.blocks + n]); });
    parallel(tables, p_.threads, [&](int64_t t) { add_shared(p_.shared[t], squares[p_.blocks + p_.last + t]); });
    return std::accumulate(squares.begin(), squares.end(), 0.0);
  }

 private:
  static constexpr int64_t GRADIENTS_AHEAD = 2, ROWS_ON_THEIR_WAY = 24;

  const char* gradient(int64_t sid, int64_t a) const {
    const int64_t bytes = width_ * bytes_of(grad_.dtype);
    if (!p_.sids->in_stream()) return static_cast<const char*>(grad_.data) + (sid * int64_t(spec_.active.size()) + a) * bytes;
    const int32_t level = spec_.active[a].level;
    if (level > p_.sids->tokens[sid]) return nullptr;
    return static_cast<const char*>(grad_.data) + (p_.sids->place[sid] + level - 1) * bytes;
  }

  A* piece(int64_t block, int32_t order, bool goes_on) {
    return pieces_.data() + ((block * p_.last + order - 1) * 2 + goes_on) * width_;
  }

  const int64_t* targets_of(int32_t order, int64_t prefix) const {
    return p_.targets[order - 1].data() + prefix * spec_.heads;
  }

  INLINE void deliver(const int64_t* targets, const int64_t* coming, ComingLines& gradients, const A* sum, double& squares) {
    destination_.deliver({targets, coming, &gradients, aside_.data(), spec_.heads, row_width_}, sum, squares);
  }

  // The targets of the prefixes of a block in the order in which they end.
  std::vector<const int64_t*> deliveries(int64_t block) const {
    std::vector<const int64_t*> order;
    std::vector<int64_t> next(p_.starts.begin() + block * p_.last, p_.starts.begin() + (block + 1) * p_.last);
    for (int64_t i = p_.first(block); i <= p_.end(block); ++i) {
      const int32_t kept = i == p_.end(block) ? 0 : p_.equal[i];
      if (i > p_.first(block))
        for (int32_t n = p_.last; n > kept; --n) order.push_back(targets_of(n, next[n - 1] - 1));
      if (i < p_.end(block))
        for (int32_t n = kept + 1; n <= p_.last; ++n) ++next[n - 1];
    }
    return order;
  }

  void walk(int64_t block, double& squares) {
    const int64_t first = p_.first(block), end = p_.end(block), actives = int64_t(spec_.active.size());
    const int32_t last = p_.last;
    const int64_t vector_bytes = width_ * bytes_of(grad_.dtype);
    const std::vector<const int64_t*> order = deliveries(block);
    const int64_t ahead = std::max<int64_t>(1, ROWS_ON_THEIR_WAY / spec_.heads), prefixes = int64_t(order.size());
    int64_t delivered = 0;
    ComingLines gradients;
    gradients.bytes = vector_bytes;
    std::vector<A> memory(last * width_, A(0));
    std::vector<A*> sums;  // of each order
    for (int32_t n = 0; n < last; ++n) sums.push_back(memory.data() + n * width_);
    std::vector<uint8_t> continued(last, 0), held(last, 0);  // held: the sum has a summand
    std::vector<int32_t> added(actives, 0);  // to which order a level's gradient is added; 0 for none
    for (int64_t a = 0; a < actives; ++a) {
      const int32_t level = spec_.active[a].level;
      added[a] = nested_ ? std::min(level, last) : level <= last ? level : 0;
    }
    // The prefixes of orders above `kept` end before sorted SID `place`.
    auto finish = [&](int32_t kept, int64_t place) {
      const bool at_end = place == end;
      for (int32_t n = last; n > kept; --n) {
        A* sum = sums[n - 1];
        if (!held[n - 1]) clear(sum, width_);
        const bool goes_on = at_end && p_.equal[end] >= n;
        if (continued[n - 1])
          std::memcpy(piece(block, n, false), sum, width_ * sizeof(A));
        else if (goes_on)
          std::memcpy(piece(block, n, true), sum, width_ * sizeof(A));
        else
          deliver(order[delivered], delivered + ahead < prefixes ? order[delivered + ahead] : nullptr, gradients, sum, squares);
        ++delivered;
        continued[n - 1] = 0;
        if (nested_ && n > 1 && held[n - 1]) {
          if (held[n - 2])
            add(sums[n - 2], static_cast<const A*>(sum), width_);
          else
            std::swap(sums[n - 1], sums[n - 2]), held[n - 2] = 1;  // all that the order below has
        }
        held[n - 1] = 0;
      }
    };
    for (int64_t k = 0; k < std::min(ahead, prefixes); ++k)
      for (int32_t h = 0; h < spec_.heads; ++h)
        if (order[k][h] >= 0) destination_.fetch(order[k][h]);
    for (int64_t i = first; i < end; ++i) {
      const int32_t same = p_.equal[i];
      if (i == first)
        for (int32_t n = 1; n <= same; ++n) continued[n - 1] = 1;
      else
        finish(same, i);
      gradients.fetch_rest();
      gradients.begin();
      if (i + GRADIENTS_AHEAD < end)
        for (int64_t a = 0; a < actives; ++a)
          if (const char* start = gradient(p_.sorted[i + GRADIENTS_AHEAD].item, a)) gradients.starts.push_back(start);
      const int64_t sid = p_.sorted[i].item;
      for (int64_t a = 0; a < actives; ++a) {
        const char* vector = gradient(sid, a);
        if (vector != nullptr && added[a] > 0)
          add_vector(sums[added[a] - 1], held[added[a] - 1], vector, grad_.dtype, width_);
      }
    }
    finish(0, end);
    end_streams();
  }

  // Adds the pieces of each prefix of an order that lies in several blocks.
  void join(int32_t order, double& squares) {
    std::vector<A> sum(width_, A(0));
    int64_t prefix = -1;
    ComingLines none;
    for (int64_t block = 0; block < p_.blocks; ++block) {
      const bool begins = p_.started(block + 1, order) > p_.started(block, order);
      const bool goes_on = p_.continued(block + 1, order);
      if (p_.continued(block, order)) {
        add(sum.data(), static_cast<const A*>(piece(block, order, false)), width_);
        if (begins || !goes_on) deliver(targets_of(order, prefix), nullptr, none, sum.data(), squares);
      }
      if (begins && goes_on) {
        std::memcpy(sum.data(), piece(block, order, true), width_ * sizeof(A));
        prefix = p_.started(block + 1, order) - 1;
      }
    }
    end_streams();
  }

  void add_shared(const std::vector<SharedRow>& rows, double& squares) {
    constexpr size_t AHEAD = 8;
    std::vector<A> sum(row_width_, A(0));
    for (size_t i = 0; i < rows.size(); ++i) {
      if (i + AHEAD < rows.size()) destination_.fetch(rows[i + AHEAD].target);
      clear(sum.data(), row_width_);
      for (int64_t slot = rows[i].first; slot < rows[i].first + rows[i].count; ++slot)
        add(sum.data(), static_cast<const A*>(aside_.data() + slot * row_width_), row_width_);
      destination_.put(rows[i].target, sum.data(), row_width_, squares);
    }
  }

  const Prefixes& p_;
  const Spec& spec_;
  const Gradient grad_;
  const Destination<A>& destination_;
  const int64_t width_, row_width_;
  const bool nested_;
  Array<A> aside_;   // [slots, w]
  Array<A> pieces_;  // [blocks, last, 2, H * w]: of the prefix a block begins in, and of the one that goes on after it
};

}  // namespace prefixmem
