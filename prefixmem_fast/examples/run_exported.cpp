// Runs an encoder that prefixmem_fast.serving.exportable made and AOTInductor compiled, without Python.
//
//     run_exported encoder.pt2 < tokens
//
// A line of standard input is one row of token ids, separated by spaces. Shorter rows are filled up with -1, which is
// text. A line of output is m of one token, its numbers with as many digits as float32 has.

#include <algorithm>
#include <cstdint>
#include <iostream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

// int64 [B, T] of the lines.
at::Tensor read_tokens(std::istream& lines) {
  std::vector<std::vector<int64_t>> rows;
  size_t longest = 0;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream numbers(line);
    rows.emplace_back();
    for (int64_t token; numbers >> token;) rows.back().push_back(token);
    longest = std::max(longest, rows.back().size());
  }
  at::Tensor input_ids = at::full({int64_t(rows.size()), int64_t(longest)}, -1, at::kLong);
  for (size_t b = 0; b < rows.size(); ++b) {
    std::copy(rows[b].begin(), rows[b].end(), input_ids.data_ptr<int64_t>() + b * longest);
  }
  return input_ids;
}

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: run_exported encoder.pt2 < tokens\n";
    return 2;
  }
  torch::inductor::AOTIModelPackageLoader encoder(argv[1]);
  std::vector<at::Tensor> outputs = encoder.run({read_tokens(std::cin)});  // m, and head where tables have output_slot

  at::Tensor m = outputs[0].to(at::kFloat).flatten(0, -2).contiguous();
  std::cout.precision(std::numeric_limits<float>::max_digits10);
  for (int64_t token = 0; token < m.size(0); ++token) {
    const float* numbers = m.data_ptr<float>() + token * m.size(1);
    for (int64_t i = 0; i < m.size(1); ++i) std::cout << (i ? " " : "") << numbers[i];
    std::cout << '\n';
  }
}
