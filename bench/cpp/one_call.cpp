// One call of the CPU kernels on a given batch, for valgrind to count: forward | step | window, M SIDs, T rows a table,
// w columns, bytes a number, 1 for float32 and 0 for bfloat16, distinct first codes. The spec is hashed, L = 5, N = 4,
// H = 4, levels 3 and 4.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "interface.h"

using namespace prefixmem;

namespace {

uint64_t state = 1;

uint64_t draw(uint64_t below) {  // SplitMix64
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return (z ^ z >> 31) % below;
}

}  // namespace

int main(int count, char** words) {
  if (count != 7) return 2;
  const bool step = !std::strcmp(words[1], "step"), window = !std::strcmp(words[1], "window");
  const int64_t sids = std::atoll(words[2]), rows = std::atoll(words[3]), width = std::atoll(words[4]);
  const int64_t dtype = std::atoll(words[5]) ? FLOAT32 : BFLOAT16, bytes = bytes_of(DType(dtype)), first = std::atoll(words[6]);
  const int64_t codebooks[] = {2048, 2048, 2048, 2048, 2048}, active[] = {3, 4}, exact[4] = {};
  std::vector<int64_t> primes, sizes(4, rows), offsets;
  for (int64_t i = 0; i < 16; ++i) primes.push_back(int64_t(524288 + draw(524288)) | 1), offsets.push_back(i * rows);
  const Sizes given{5, 4, 4, 0, 1, 2, 5, 0, codebooks, primes.data(), sizes.data(), offsets.data(), exact, active};
  const Spec* spec = prefixmem_spec(&given);
  std::vector<int64_t> codes(sids * 5);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = int64_t(draw(uint64_t(i % 5 == 0 ? first : 2048)));
  const int64_t table_bytes = (16 * rows * width * bytes + 63) / 64 * 64;
  void* table = std::aligned_alloc(64, table_bytes);
  std::memset(table, 0, table_bytes);
  void* sums = std::calloc(16 * rows, 4);
  const int64_t vector_bytes = 4 * width * bytes;
  void* S = aligned_alloc(64, sids * 2 * vector_bytes);
  std::memset(S, 0, sids * 2 * vector_bytes);
  const Source source{codes.data(), 8, sids, nullptr, 8, nullptr, 8, nullptr, 0, 0, 0, 0};
  std::vector<int64_t> tokens(sids * 4);  // up to the last active level
  std::vector<int32_t> token_table;
  for (int32_t id = 0; id < 4 * 2048; ++id) token_table.insert(token_table.end(), {id / 2048 + 1, id % 2048});
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = int64_t(i % 4 * 2048) + codes[i / 4 * 5 + i % 4];
  if (window) {
    prefixmem_last_tokens(spec, token_table.data(), 4 * 2048, tokens.data(), 8, sids, 4, 4, table, nullptr, dtype, width, S,
                          dtype, 1);
  } else if (step) {
    UpdateNumbers update{table, nullptr, sums, width, int32_t(dtype), ROW_ADAGRAD, dtype == BFLOAT16, 7, 0.01, 1, 1e-10, 0, 0, 1, 1};
    double squares = 0;
    Plan* plan = prefixmem_plan(spec, &source, 1);
    prefixmem_sum(plan, S, dtype, 4 * width, nullptr, 0, &update, &squares);
    std::printf("rows %lld\n", static_cast<long long>(prefixmem_number(plan, nullptr)));
    prefixmem_free_plan(plan);
  } else {
    prefixmem_forward(spec, &source, table, nullptr, dtype, width, S, dtype, 1);
  }
  return 0;
}
