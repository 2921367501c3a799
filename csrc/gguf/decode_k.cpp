// See decoders.h.
#include "gguf/block_layouts.h"
#include "gguf/decoders.h"
#include "gguf/float_bits.h"

namespace kt {
namespace {

// Bits 0-1 of weight i of a Q2_K or Q3_K block. qs: [64].
int low_pair(const uint8_t* qs, int i) { return (qs[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2)) & 3; }

// Bits 0-3 of weight i of a Q4_K or Q5_K block. qs: [128].
int low_bits(const uint8_t* qs, int i) { return (qs[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4)) & 15; }

}  // namespace

void decode_q2_k(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockQ2_K*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    const float d = f16_to_f32(load_u16(block->d)), dmin = f16_to_f32(load_u16(block->dmin));
    for (int i = 0; i < kBlockK; ++i) {
      const float scale = d * static_cast<float>(block->scales[i / 16] & 15);
      const float min = dmin * static_cast<float>(block->scales[i / 16] >> 4);
      out[start + i] = scale * static_cast<float>(low_pair(block->qs, i)) - min;
    }
  }
}

void decode_q3_k(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockQ3_K*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    uint8_t scales[16];
    unpack_scales_q3_k(block->scales, scales);
    const float d = f16_to_f32(load_u16(block->d));
    for (int i = 0; i < kBlockK; ++i) {
      const float scale = d * static_cast<float>(scales[i / 16] - 32);
      const int q = low_pair(block->qs, i) | (((block->hmask[i % 32] >> (i / 32)) & 1) << 2);
      out[start + i] = scale * static_cast<float>(q - 4);
    }
  }
}

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

}  // namespace kt
