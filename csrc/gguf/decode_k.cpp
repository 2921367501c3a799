// See decoders.h.
#include "gguf/block_layouts.h"
#include "gguf/decoders.h"
#include "gguf/float_bits.h"

namespace kt {
namespace {

// Loops over plain pieces of a block, with nothing to look up for each weight: the compiler makes vectors of them.

// out[i] = scale * q(i) - min. out: [n], nothing else points there.
template <int n, class Quant>
void write_affine(float* __restrict out, float scale, float min, Quant q) {
  for (int i = 0; i < n; ++i) out[i] = scale * static_cast<float>(q(i)) - min;
}

// out[i] = scale * q(i). out: [n], nothing else points there.
template <int n, class Quant>
void write_scaled(float* __restrict out, float scale, Quant q) {
  for (int i = 0; i < n; ++i) out[i] = scale * static_cast<float>(q(i));
}

}  // namespace

void decode_q2_k(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockQ2_K*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    const float d = f16_to_f32(load_u16(block->d)), dmin = f16_to_f32(load_u16(block->dmin));
    for (int group = 0; group < 16; ++group, out += 16) {
      const uint8_t* qs = block->qs + group / 8 * 32 + group % 2 * 16;
      const int shift = group / 2 % 4 * 2;
      const float scale = d * static_cast<float>(block->scales[group] & 15);
      const float min = dmin * static_cast<float>(block->scales[group] >> 4);
      write_affine<16>(out, scale, min, [&](int i) { return (qs[i] >> shift) & 3; });
    }
  }
}

void decode_q3_k(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockQ3_K*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    uint8_t scales[16];
    unpack_scales_q3_k(block->scales, scales);
    const float d = f16_to_f32(load_u16(block->d));
    for (int group = 0; group < 16; ++group, out += 16) {
      const uint8_t* qs = block->qs + group / 8 * 32 + group % 2 * 16;
      const uint8_t* third_bits = block->hmask + group % 2 * 16;
      const int shift = group / 2 % 4 * 2, bit = group / 2;
      write_scaled<16>(out, d * static_cast<float>(scales[group] - 32),
                       [&](int i) { return (((qs[i] >> shift) & 3) | (((third_bits[i] >> bit) & 1) << 2)) - 4; });
    }
  }
}

void decode_q4_k(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockQ4_K*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    uint8_t scales[8], mins[8];
    unpack_scales_k4(block->scales, scales, mins);
    const float d = f16_to_f32(load_u16(block->d)), dmin = f16_to_f32(load_u16(block->dmin));
    for (int group = 0; group < 8; ++group, out += 32) {
      const uint8_t* qs = block->qs + group / 2 * 32;
      const int shift = group % 2 * 4;
      const float scale = d * static_cast<float>(scales[group]);
      const float min = dmin * static_cast<float>(mins[group]);
      write_affine<32>(out, scale, min, [&](int i) { return (qs[i] >> shift) & 15; });
    }
  }
}

void decode_q5_k(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockQ5_K*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    uint8_t scales[8], mins[8];
    unpack_scales_k4(block->scales, scales, mins);
    const float d = f16_to_f32(load_u16(block->d)), dmin = f16_to_f32(load_u16(block->dmin));
    for (int group = 0; group < 8; ++group, out += 32) {
      const uint8_t *qs = block->qs + group / 2 * 32, *fifth_bits = block->qh;
      const int shift = group % 2 * 4;
      const float scale = d * static_cast<float>(scales[group]);
      const float min = dmin * static_cast<float>(mins[group]);
      write_affine<32>(out, scale, min,
                       [&](int i) { return ((qs[i] >> shift) & 15) | (((fifth_bits[i] >> group) & 1) << 4); });
    }
  }
}

void decode_q6_k(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockQ6_K*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    const float d = f16_to_f32(load_u16(block->d));
    for (int group = 0; group < 16; ++group, out += 16) {
      const uint8_t* ql = block->ql + group / 8 * 64 + group % 4 * 16;
      const uint8_t* qh = block->qh + group / 8 * 32 + group % 2 * 16;
      const int low_shift = group / 4 % 2 * 4, high_shift = group / 2 % 4 * 2;
      write_scaled<16>(out, d * static_cast<float>(static_cast<int8_t>(block->scales[group])),
                       [&](int i) { return (((ql[i] >> low_shift) & 15) | (((qh[i] >> high_shift) & 3) << 4)) - 32; });
    }
  }
}

}  // namespace kt
