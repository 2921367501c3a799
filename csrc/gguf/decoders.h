// The decoders behind dequantize(), by family. In each: blocks [num_weights / block size], any alignment;
// out [num_weights]; num_weights is a multiple of the block size.
#pragma once

#include <cstdint>

// The order of the float operations is that of the `gguf` package; a fused multiply-add would round differently.
#ifdef __FMA__
#error "compile this file for the baseline: decoding must be bit-exact"
#endif

namespace kt {

// decode_blocks32.cpp: 32 weights a block
void decode_q4_0(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_q4_1(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_q5_0(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_q5_1(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_q8_0(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_iq4_nl(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_mxfp4(const uint8_t* blocks, int64_t num_weights, float* out);

// decode_k.cpp: 256 weights a block, quants in plain bits
void decode_q2_k(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_q3_k(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_q4_k(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_q5_k(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_q6_k(const uint8_t* blocks, int64_t num_weights, float* out);

// decode_iq.cpp: 256 weights a block, quants that point into a table
void decode_iq1_s(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_iq1_m(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_iq2_xxs(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_iq2_xs(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_iq2_s(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_iq3_xxs(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_iq3_s(const uint8_t* blocks, int64_t num_weights, float* out);
void decode_iq4_xs(const uint8_t* blocks, int64_t num_weights, float* out);

}  // namespace kt
