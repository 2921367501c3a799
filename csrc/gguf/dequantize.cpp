#include "gguf/dequantize.h"

#include <cstring>

#include "check.h"
#include "gguf/block_layouts.h"
#include "gguf/float_bits.h"

// The order of the float operations below is that of the `gguf` package; a fused multiply-add would round differently.
#ifdef __FMA__
#error "compile this file for the baseline: decoding must be bit-exact"
#endif

namespace kt {
namespace {

// In every decoder: blocks [num_weights / block size], out [num_weights].

void decode_f32(const uint8_t* blocks, int64_t num_weights, float* out) {
  if (num_weights > 0) std::memcpy(out, blocks, static_cast<size_t>(num_weights) * sizeof(float));
}

void decode_f16(const uint8_t* blocks, int64_t num_weights, float* out) {
  for (int64_t i = 0; i < num_weights; ++i) out[i] = f16_to_f32(load_u16(blocks + 2 * i));
}

void decode_bf16(const uint8_t* blocks, int64_t num_weights, float* out) {
  for (int64_t i = 0; i < num_weights; ++i) out[i] = bf16_to_f32(load_u16(blocks + 2 * i));
}

void decode_q8_0(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockQ8_0*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockQ8_0, ++block) {
    const float d = f16_to_f32(load_u16(block->d));
    for (int i = 0; i < kBlockQ8_0; ++i) out[start + i] = static_cast<float>(static_cast<int8_t>(block->qs[i])) * d;
  }
}

// Bits 0-3 of weight i of a Q4_K or Q5_K block. qs: [128].
int low_bits(const uint8_t* qs, int i) { return (qs[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4)) & 15; }

void decode_q4_k(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockQ4_K*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    uint8_t scales[8], mins[8];
    unpack_scales_k4(block->scales, scales, mins);
    const float d = f16_to_f32(load_u16(block->d)), dmin = f16_to_f32(load_u16(block->dmin));
    for (int i = 0; i < kBlockK; ++i) {
      const float scale = d * static_cast<float>(scales[i / 32]);
      const float min = dmin * static_cast<float>(mins[i / 32]);
      out[start + i] = scale * static_cast<float>(low_bits(block->qs, i)) - min;
    }
  }
}

void decode_q5_k(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockQ5_K*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    uint8_t scales[8], mins[8];
    unpack_scales_k4(block->scales, scales, mins);
    const float d = f16_to_f32(load_u16(block->d)), dmin = f16_to_f32(load_u16(block->dmin));
    for (int i = 0; i < kBlockK; ++i) {
      const float scale = d * static_cast<float>(scales[i / 32]);
      const float min = dmin * static_cast<float>(mins[i / 32]);
      const int q = low_bits(block->qs, i) | (((block->qh[i % 32] >> (i / 32)) & 1) << 4);
      out[start + i] = scale * static_cast<float>(q) - min;
    }
  }
}

void decode_q6_k(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockQ6_K*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    const float d = f16_to_f32(load_u16(block->d));
    for (int i = 0; i < kBlockK; ++i) {
      const int half = i / 128, j = i % 128;
      const int low = (block->ql[half * 64 + j % 64] >> (j / 64 * 4)) & 15;
      const int high = (block->qh[half * 32 + j % 32] >> (j / 32 * 2)) & 3;
      const float scale = d * static_cast<float>(static_cast<int8_t>(block->scales[i / 16]));
      out[start + i] = scale * static_cast<float>((low | (high << 4)) - 32);
    }
  }
}

}  // namespace

void dequantize(GgmlType type, const uint8_t* blocks, int64_t num_weights, float* output) {
  ggml_row_bytes(type, num_weights);  // throws when num_weights is not whole blocks
  switch (type) {
    case GgmlType::F32:
      return decode_f32(blocks, num_weights, output);
    case GgmlType::F16:
      return decode_f16(blocks, num_weights, output);
    case GgmlType::Q8_0:
      return decode_q8_0(blocks, num_weights, output);
    case GgmlType::Q4_K:
      return decode_q4_k(blocks, num_weights, output);
    case GgmlType::Q5_K:
      return decode_q5_k(blocks, num_weights, output);
    case GgmlType::Q6_K:
      return decode_q6_k(blocks, num_weights, output);
    case GgmlType::BF16:
      return decode_bf16(blocks, num_weights, output);
  }
}

}  // namespace kt
