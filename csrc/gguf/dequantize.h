// Decoding GGML blocks to float32, bit for bit what the `gguf` Python package gives. Scalar; the oracle of every
// kernel.
#pragma once

#include <cstdint>

#include "gguf/ggml_type.h"

namespace kt {

// blocks: num_weights / block_size blocks of `type`, any alignment. output: [num_weights].
// num_weights must be a multiple of the block size (throws kt::Error).
void dequantize(GgmlType type, const uint8_t* blocks, int64_t num_weights, float* output);

}  // namespace kt
