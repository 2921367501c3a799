// See decoders.h.
#include "gguf/block_layouts.h"
#include "gguf/decoders.h"
#include "gguf/float_bits.h"
#include "gguf/iq_grids.h"

namespace kt {
namespace {

// The nibble of weight i. qs: [16].
int nibble(const uint8_t* qs, int i) { return (qs[i % 16] >> (i / 16 * 4)) & 15; }

// The fifth bit of weight i, in its place. qh: [4].
int fifth_bit(const uint8_t* qh, int i) { return ((qh[i / 8] >> (i % 8)) & 1) << 4; }

}  // namespace

void decode_q4_0(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockQ4_0*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlock32, ++block) {
    const float d = f16_to_f32(load_u16(block->d));
    for (int i = 0; i < kBlock32; ++i) out[start + i] = d * static_cast<float>(nibble(block->qs, i) - 8);
  }
}

void decode_q4_1(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockQ4_1*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlock32, ++block) {
    const float d = f16_to_f32(load_u16(block->d)), m = f16_to_f32(load_u16(block->m));
    for (int i = 0; i < kBlock32; ++i) out[start + i] = d * static_cast<float>(nibble(block->qs, i)) + m;
  }
}

void decode_q5_0(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockQ5_0*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlock32, ++block) {
    const float d = f16_to_f32(load_u16(block->d));
    for (int i = 0; i < kBlock32; ++i)
      out[start + i] = d * static_cast<float>((nibble(block->qs, i) | fifth_bit(block->qh, i)) - 16);
  }
}

void decode_q5_1(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockQ5_1*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlock32, ++block) {
    const float d = f16_to_f32(load_u16(block->d)), m = f16_to_f32(load_u16(block->m));
    for (int i = 0; i < kBlock32; ++i)
      out[start + i] = d * static_cast<float>(nibble(block->qs, i) | fifth_bit(block->qh, i)) + m;
  }
}

void decode_q8_0(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockQ8_0*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlock32, ++block) {
    const float d = f16_to_f32(load_u16(block->d));
    for (int i = 0; i < kBlock32; ++i) out[start + i] = static_cast<float>(static_cast<int8_t>(block->qs[i])) * d;
  }
}

void decode_iq4_nl(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockIQ4_NL*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlock32, ++block) {
    const float d = f16_to_f32(load_u16(block->d));
    for (int i = 0; i < kBlock32; ++i) out[start + i] = d * static_cast<float>(iq4nl_values[nibble(block->qs, i)]);
  }
}

void decode_mxfp4(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockMXFP4*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlock32, ++block) {
    const float d = e8m0_half_to_f32(block->e);
    for (int i = 0; i < kBlock32; ++i) out[start + i] = d * static_cast<float>(mxfp4_values[nibble(block->qs, i)]);
  }
}

}  // namespace kt
