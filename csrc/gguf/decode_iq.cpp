// See decoders.h.
#include "gguf/block_layouts.h"
#include "gguf/decoders.h"
#include "gguf/float_bits.h"
#include "gguf/iq_grids.h"

namespace kt {
namespace {

// Nibble i of a row of them, low one first.
int nibble(const uint8_t* nibbles, int i) { return (nibbles[i / 2] >> (i % 2 * 4)) & 15; }

// An octet of IQ1. word: of iq1s_grid. out: [8].
void put_iq1(float scale, uint64_t word, float delta, float* out) {
  for (int i = 0; i < 8; ++i)
    out[i] = scale * (static_cast<float>(static_cast<int8_t>(word >> (8 * i) & 0xff)) + delta);
}

// count weights of IQ2 or IQ3. word: magnitudes, one a byte; signs: bit i is set where weight i is negative.
void put_signed(float scale, uint64_t word, int signs, int count, float* out) {
  for (int i = 0; i < count; ++i) {
    const auto magnitude = static_cast<float>(word >> (8 * i) & 0xff);
    out[i] = scale * (signs >> i & 1 ? -magnitude : magnitude);
  }
}

constexpr float kDelta = 0.125f;  // of IQ1

// The scale of IQ2 and IQ3_XXS; fraction: 1/4 and 1/2.
float half_odd_scale(float d, uint32_t scale, float fraction) {
  return d * (0.5f + static_cast<float>(scale)) * fraction;
}

}  // namespace

void decode_iq1_s(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockIQ1_S*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    const float d = f16_to_f32(load_u16(block->d));
    for (int octet = 0; octet < 32; ++octet) {
      const int high = load_u16(block->qh + octet / 4 * 2);
      const float scale = d * static_cast<float>(2 * (high >> 12 & 7) + 1);
      const int index = block->qs[octet] | (high >> (octet % 4 * 3) & 7) << 8;
      put_iq1(scale, iq1s_grid[index], high & 0x8000 ? -kDelta : kDelta, out + start + octet * 8);
    }
  }
}

void decode_iq1_m(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockIQ1_M*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    const float d = f16_to_f32(iq1_m_scale_bits(block->scales));
    for (int octet = 0; octet < 32; ++octet) {
      const int scales = load_u16(block->scales + octet / 8 * 2), high = nibble(block->qh, octet);
      const float scale = d * static_cast<float>(2 * (scales >> (octet / 2 % 4 * 3) & 7) + 1);
      const int index = block->qs[octet] | (high & 7) << 8;
      put_iq1(scale, iq1s_grid[index], high & 8 ? -kDelta : kDelta, out + start + octet * 8);
    }
  }
}

void decode_iq2_xxs(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockIQ2_XXS*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    const float d = f16_to_f32(load_u16(block->d));
    for (int octet = 0; octet < 32; ++octet) {
      const uint8_t* group = block->qs + octet / 4 * 8;
      const uint32_t signs = load_u32(group + 4);
      put_signed(half_odd_scale(d, signs >> 28, 0.25f), iq2xxs_grid[group[octet % 4]],
                 iq_signs(signs >> (octet % 4 * 7) & 127), 8, out + start + octet * 8);
    }
  }
}

void decode_iq2_xs(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockIQ2_XS*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    const float d = f16_to_f32(load_u16(block->d));
    for (int octet = 0; octet < 32; ++octet) {
      const int q = load_u16(block->qs + octet * 2);
      const auto scale = static_cast<uint32_t>(nibble(block->scales, octet / 2));
      put_signed(half_odd_scale(d, scale, 0.25f), iq2xs_grid[q & 511], iq_signs(q >> 9), 8, out + start + octet * 8);
    }
  }
}

void decode_iq2_s(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockIQ2_S*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    const float d = f16_to_f32(load_u16(block->d));
    for (int octet = 0; octet < 32; ++octet) {
      const int index = block->qs[octet] | (block->qh[octet / 4] >> (octet % 4 * 2) & 3) << 8;
      const auto scale = static_cast<uint32_t>(nibble(block->scales, octet / 2));
      put_signed(half_odd_scale(d, scale, 0.25f), iq2s_grid[index], block->signs[octet], 8, out + start + octet * 8);
    }
  }
}

void decode_iq3_xxs(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockIQ3_XXS*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    const float d = f16_to_f32(load_u16(block->d));
    for (int quad = 0; quad < 64; ++quad) {
      const uint32_t signs = load_u32(block->signs + quad / 8 * 4);
      const int octet_signs = iq_signs(signs >> (quad / 2 % 4 * 7) & 127);
      put_signed(half_odd_scale(d, signs >> 28, 0.5f), iq3xxs_grid[block->qs[quad]], octet_signs >> (quad % 2 * 4), 4,
                 out + start + quad * 4);
    }
  }
}

void decode_iq3_s(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockIQ3_S*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    const float d = f16_to_f32(load_u16(block->d));
    for (int quad = 0; quad < 64; ++quad) {
      const int index = block->qs[quad] | (block->qh[quad / 8] >> (quad % 8) & 1) << 8;
      const float scale = d * static_cast<float>(2 * nibble(block->scales, quad / 8) + 1);
      put_signed(scale, iq3s_grid[index], block->signs[quad / 2] >> (quad % 2 * 4), 4, out + start + quad * 4);
    }
  }
}

void decode_iq4_xs(const uint8_t* blocks, int64_t num_weights, float* out) {
  const auto* block = reinterpret_cast<const BlockIQ4_XS*>(blocks);
  for (int64_t start = 0; start < num_weights; start += kBlockK, ++block) {
    const float d = f16_to_f32(load_u16(block->d));
    const int scales_high = load_u16(block->scales_h);
    for (int i = 0; i < kBlockK; ++i) {
      const int group = i / 32;
      const int scale = nibble(block->scales_l, group) | (scales_high >> (group * 2) & 3) << 4;
      const int q = (block->qs[group * 16 + i % 16] >> (i / 16 % 2 * 4)) & 15;
      out[start + i] = d * static_cast<float>(scale - 32) * static_cast<float>(iq4nl_values[q]);
    }
  }
}

}  // namespace kt
