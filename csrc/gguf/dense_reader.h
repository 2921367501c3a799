// A dense tensor from its file to floats in memory, in one call.
#pragma once

#include <cstdint>
#include <string>

#include "float_type.h"
#include "gguf/ggml_type.h"

namespace kt {

// Where a tensor is: blocks of `type` from `offset` of the file at `path` on.
struct DenseSource {
  std::string path;
  uint64_t offset;
  GgmlType type;
  int64_t num_weights;  // a multiple of the block size
};

// Of weights, what one thread takes at a time: 1 MiB as float32. A tensor of no more starts no thread.
inline constexpr int64_t kDenseChunk = int64_t{1} << 18;

// Decodes as dequantize() does and rounds to nearest even; NaN stays NaN. destination: [num_weights] of float_type,
// aligned to it; holds anything after an error. The calling thread works too, with up to num_threads - 1 others that
// inherit its CPUs and end before the call does; each takes the bytes of a chunk as memory. Any thread may call.
// Throws kt::Error when num_weights is not whole blocks or num_threads not positive, and when the file cannot be
// opened, cannot be read, or ends inside the tensor, which `name` stands for in the sentence.
void read_dense(const DenseSource& source, const std::string& name, void* destination, FloatType float_type,
                int num_threads);

}  // namespace kt
