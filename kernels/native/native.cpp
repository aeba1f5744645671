// The functions that prefixmem_fast/operation/native.py calls, in C: plain integers and addresses of tensors.
//
// A function that fails returns a negative number, or no address. dtypes are numbered as in numbers.h.
#include <algorithm>
#include <cstdint>
#include <new>

#include "interface.h"
#include "kernels.h"
#include "outputs.h"

using namespace prefixmem;

namespace {

constexpr int64_t OUT_OF_MEMORY = -1, NO_SUCH_ROW = -2, FAILED = -3;

template <class F> int64_t guarded(F&& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  } catch (...) {
    return FAILED;
  }
}

Sids sids_of(const Source& source, const Spec& spec) {
  if (source.is_stream)
    return find_sids({{source.ids, int32_t(source.id_bytes)}, {source.segments, int32_t(source.segment_bytes)},
                      {source.token_table, source.vocabulary}, source.rows, source.length}, spec);
  Sids sids;
  sids.codes = {source.codes, int32_t(source.code_bytes)};
  sids.count = source.sids;
  return sids;
}

}  // namespace

extern "C" {

const Spec* prefixmem_spec(const Sizes* sizes) {
  try {
    auto* spec = new Spec{};
    spec->levels = int32_t(sizes->levels), spec->orders = int32_t(sizes->orders), spec->heads = int32_t(sizes->heads);
    spec->mode = int32_t(sizes->mode), spec->narrow = sizes->narrow != 0;
    spec->item_levels = int32_t(sizes->item_levels), spec->gap = int32_t(sizes->gap);
    spec->sizes.assign(sizes->codebooks, sizes->codebooks + sizes->levels);
    spec->multipliers.assign(sizes->multipliers, sizes->multipliers + sizes->orders * sizes->heads);
    spec->offsets.assign(sizes->offsets, sizes->offsets + sizes->orders * sizes->heads);
    spec->rows.assign(sizes->rows, sizes->rows + sizes->orders);
    for (int64_t& rows : spec->rows) rows = std::max<int64_t>(rows, 1);  // a modulus of orders that hold none
    spec->exact.assign(sizes->exact, sizes->exact + sizes->orders);
    for (int64_t rows : spec->rows) spec->reciprocals.push_back(~uint64_t(0) / uint64_t(rows) + 1);
    int32_t summed = 0;  // orders that the running sum of prefix mode holds
    for (int64_t a = 0; a < sizes->actives; ++a) {
      const int32_t level = int32_t(sizes->active[a]), last = std::min(level, spec->orders);
      const int32_t first_read = int32_t(spec->reads.size());
      if (spec->mode == PREFIX)
        for (; summed < last; ++summed) spec->reads.push_back({summed + 1, 1, summed + 1});
      else if (spec->mode == SUFFIX)
        for (int32_t n = 1; n <= last; ++n) spec->reads.push_back({n, level - n + 1, level});
      else if (level <= spec->orders)
        spec->reads.push_back({level, 1, level});
      spec->active.push_back({level, first_read, int32_t(spec->reads.size())});
      spec->last_order = std::max(spec->last_order, spec->mode == FULL && level > spec->orders ? 0 : last);
    }
    return spec;
  } catch (...) {
    return nullptr;
  }
}

void prefixmem_free_spec(const Spec* spec) { delete spec; }

int64_t prefixmem_rows(const Spec* spec, const void* codes, int64_t code_bytes, int64_t sids, int64_t* out, int64_t threads) {
  return guarded([&] {
    all_rows(*spec, {codes, int32_t(code_bytes)}, sids, out, int(threads));
    return int64_t(0);
  });
}

int64_t prefixmem_forward(const Spec* spec, const Source* source, const void* rows, const float* scales,
                          int64_t dtype, int64_t width, void* out, int64_t out_dtype, int64_t threads) {
  return guarded([&] {
    const Table table{rows, scales, DType(dtype), DType(out_dtype), width};
    forward(table, *spec, sids_of(*source, *spec), out, int(threads));
    return int64_t(0);
  });
}

int64_t prefixmem_last_tokens(const Spec* spec, const int32_t* token_table, int64_t vocabulary, const void* tokens,
                              int64_t token_bytes, int64_t count, int64_t length, int64_t stride, const void* rows,
                              const float* scales, int64_t dtype, int64_t width, void* out, int64_t out_dtype,
                              int64_t threads) {
  return guarded([&] {
    const Table table{rows, scales, DType(dtype), DType(out_dtype), width};
    const TokenWindows windows{{tokens, int32_t(token_bytes)}, {token_table, vocabulary}, count, length, stride};
    last_tokens(table, *spec, windows, out, int(threads));
    return int64_t(0);
  });
}

Plan* prefixmem_plan(const Spec* spec, const Source* source, int64_t threads) {
  try {
    auto made = std::make_unique<Plan>();
    made->spec = spec;
    made->sids = sids_of(*source, *spec);
    made->threads = made->sids.count > ALONE ? int(threads) : 1;
    with_threads(made->threads, [&] { find_rows(*made); });
    return made.release();
  } catch (...) {
    return nullptr;
  }
}

void prefixmem_free_plan(Plan* plan) { delete plan; }

// The number of touched rows; with `out`, the rows in ascending order, and `prefixmem_sum` then writes their sums there.
int64_t prefixmem_number(Plan* plan, int64_t* out) {
  return guarded([&] { return number(*plan, out); });
}

// The sums of the gradient over each touched row: written to `sums`, or used in an update. *squares is that of all.
int64_t prefixmem_sum(const Plan* plan, const void* grad, int64_t dtype, int64_t width, void* sums, int64_t sums_dtype,
                      const UpdateNumbers* update, double* squares) {
  return guarded([&] {
    with_threads(plan->threads, [&] {
      *squares = sum(*plan, {grad, DType(dtype), width}, {sums, DType(sums_dtype), update});
    });
    return int64_t(0);
  });
}

int64_t prefixmem_sum_sparse(const int64_t* rows, int64_t entries, int64_t table_rows, int64_t width, const void* values, int64_t dtype,
                             const UpdateNumbers* update, double* squares, int64_t threads) {
  return guarded([&] {
    for (int64_t i = 0; i < entries; ++i)
      if (uint64_t(rows[i]) >= uint64_t(table_rows)) return NO_SUCH_ROW;
    *squares = sum_sparse(rows, entries, table_rows, width, values, DType(dtype), {nullptr, FLOAT32, update}, int(threads));
    return int64_t(0);
  });
}

DLPackTensor* prefixmem_output(const int64_t* shape, int64_t dimensions, int64_t type_code, int64_t type_bits) {
  try {
    return new_output(shape, int32_t(dimensions), int32_t(type_code), int32_t(type_bits));
  } catch (...) {
    return nullptr;
  }
}

void prefixmem_use_openmp(void* parallel) { use_openmp(reinterpret_cast<OpenMP>(parallel)); }

// Bytes of freed results and temporary arrays that are kept for the next call; returns the limit before.
int64_t prefixmem_keep_at_most(int64_t bytes) { return int64_t(keep_at_most(size_t(bytes))); }
int64_t prefixmem_bytes_kept() { return int64_t(bytes_kept()); }

}  // extern "C"
