// Results in kept memory, as tensors by way of DLPack: the deleter gives their block back.
#pragma once
#include <cstdint>

#include "memory.h"

namespace prefixmem {

// The layout of DLPack 0.8, of which PyTorch's from_dlpack takes a pointer.
struct DLPackTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
  void* context;
  void (*deleter)(DLPackTensor*);
};

struct Output {
  DLPackTensor tensor;
  int64_t shape[4];
  size_t bytes;
};

// Contiguous, on the CPU, of at most 4 dimensions; not initialized.
inline DLPackTensor* new_output(const int64_t* shape, int32_t dimensions, int32_t type_code, int32_t type_bits) {
  auto* output = new Output{};
  output->bytes = size_t(type_bits) / 8;
  for (int32_t d = 0; d < dimensions; ++d) output->bytes *= size_t(output->shape[d] = shape[d]);
  try {
    output->tensor = {take(output->bytes), 1, 0, dimensions, uint8_t(type_code), uint8_t(type_bits), 1, output->shape,
                      nullptr, 0, output, [](DLPackTensor* tensor) {
                        auto* mine = static_cast<Output*>(tensor->context);
                        give(tensor->data, mine->bytes);
                        delete mine;
                      }};
  } catch (...) {
    delete output;
    throw;
  }
  return &output->tensor;
}

}  // namespace prefixmem
