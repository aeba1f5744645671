// The functions of the library, for callers in C++; operation/native.py has the same for Python.
#pragma once
#include <cstdint>

#include "update.h"

namespace prefixmem {

struct Spec;
struct Plan;
struct DLPackTensor;

struct Sizes {  // as numbers of Python
  int64_t levels, orders, heads, mode, narrow, actives, item_levels, gap;
  const int64_t *codebooks, *multipliers, *rows, *offsets, *exact, *active;
};

// A batch: codes [M, L], or a token stream.
struct Source {
  const void* codes;
  int64_t code_bytes, sids;
  const void* ids;
  int64_t id_bytes;
  const void* segments;
  int64_t segment_bytes;
  const int32_t* token_table;
  int64_t vocabulary, rows, length, is_stream;
};

}  // namespace prefixmem

#pragma GCC visibility push(default)
extern "C" {
const prefixmem::Spec* prefixmem_spec(const prefixmem::Sizes*);
void prefixmem_free_spec(const prefixmem::Spec*);
int64_t prefixmem_rows(const prefixmem::Spec*, const void* codes, int64_t code_bytes, int64_t sids, int64_t* out,
                       int64_t threads);
int64_t prefixmem_forward(const prefixmem::Spec*, const prefixmem::Source*, const void* rows, const float* scales,
                          int64_t dtype, int64_t width, void* out, int64_t out_dtype, int64_t threads);
int64_t prefixmem_last_tokens(const prefixmem::Spec*, const int32_t* token_table, int64_t vocabulary,
                              const void* tokens, int64_t token_bytes, int64_t count, int64_t length, int64_t stride,
                              const void* rows, const float* scales, int64_t dtype, int64_t width, void* out,
                              int64_t out_dtype, int64_t threads);
prefixmem::Plan* prefixmem_plan(const prefixmem::Spec*, const prefixmem::Source*, int64_t threads);
void prefixmem_free_plan(prefixmem::Plan*);
int64_t prefixmem_number(prefixmem::Plan*, int64_t* out);
int64_t prefixmem_sum(const prefixmem::Plan*, const void* grad, int64_t dtype, int64_t width, void* sums,
                      int64_t sums_dtype, const prefixmem::UpdateNumbers*, double* squares);
int64_t prefixmem_sum_sparse(const int64_t* rows, int64_t entries, int64_t table_rows, int64_t width, const void* values, int64_t dtype,
                             const prefixmem::UpdateNumbers*, double* squares, int64_t threads);
prefixmem::DLPackTensor* prefixmem_output(const int64_t* shape, int64_t dimensions, int64_t type_code, int64_t type_bits);
void prefixmem_use_openmp(void* parallel);
int64_t prefixmem_keep_at_most(int64_t bytes);
int64_t prefixmem_bytes_kept();
}
#pragma GCC visibility pop
