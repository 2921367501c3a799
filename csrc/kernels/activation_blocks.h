// Quantised activations as the kernels store them: x = scale * q, scale = max|x| / 127, rounded to nearest even.
// A block with a NaN or an infinity has scale NaN; one whose largest |x| is under kSmallestMax has scale 0.
#pragma once

#include <cstdint>

namespace kt {

// ActivationFormat::INT8_32
struct ActivationBlock32 {
  float scale;
  int8_t q[32];
};

// ActivationFormat::INT8_256. Five cache lines, so that in an aligned row no load of q crosses one.
struct ActivationBlock256 {
  int8_t q[256];
  int16_t sums[16];  // of every 16 q: first those of groups 0, 2, .. 14, then 1, 3, .. 15, the order of 128-bit lanes
  float scale;
  uint8_t padding[28];
};

static_assert(sizeof(ActivationBlock32) == 36 && sizeof(ActivationBlock256) == 320);

// 127 times the smallest normal float: below it 127 / max could overflow. Far under anything a model computes.
inline constexpr float kSmallestMax = 127 * 0x1p-126f;

}  // namespace kt
