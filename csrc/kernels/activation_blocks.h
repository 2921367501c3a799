// Quantised activations as the kernels store them: x = scale * q, scale = max|x| / 127, rounded to nearest even.
// A block with a NaN or an infinity has scale NaN; one whose largest |x| is under kSmallestMax has scale 0.
#pragma once

#include <cstdint>

namespace kt {

// ActivationFormat::INT8_32, a cache line each. Weights are scale * code - min, so with the sums at hand
//   sum of w * x = scale * (x.scale * sum of code * x.q) - min * x.sum
// takes one multiplication of vectors more for the mins, and nothing inside the integer products.
struct alignas(64) ActivationBlock32 {
  int8_t q[32];
  float scale;
  float sum;            // scale * sum of q
  float half_sums[2];   // the same of q[0..15] and of q[16..31], for types with a scale every 16 weights
  int32_t neg128_sum;   // -128 * sum of q: what an unsigned product of (int8 code + 128) has too much
  uint8_t padding[12];  // zero: rows are copied and compared as bytes
};

static_assert(sizeof(ActivationBlock32) == 64);

// 127 times the smallest normal float: below it 127 / max could overflow. Far under anything a model computes.
inline constexpr float kSmallestMax = 127 * 0x1p-126f;

}  // namespace kt
