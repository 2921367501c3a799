// Scalar conversions among float32, float16, bfloat16 and E8M0, in plain integer arithmetic.
// `static inline`: files compiled for an instruction set include this, and each must keep its own copy.
#pragma once

#include <cstdint>
#include <cstring>

namespace kt {

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// bytes: [2] and [4], any alignment, little endian as in a GGUF file.
static inline uint16_t load_u16(const uint8_t* bytes) { return static_cast<uint16_t>(bytes[0] | (bytes[1] << 8)); }

static inline uint32_t load_u32(const uint8_t* bytes) {
  return load_u16(bytes) | (static_cast<uint32_t>(load_u16(bytes + 2)) << 16);
}

// Chooses by masks: around a branch the compiler makes no vectors of a loop over this, since float operations may trap.
static inline float f16_to_f32(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t is_small = 0u - static_cast<uint32_t>(magnitude < 0x400u);           // zero or subnormal
  const uint32_t is_large = 0u - static_cast<uint32_t>(magnitude >= 0x7c00u);         // infinity or NaN
  const uint32_t small = float_to_bits(static_cast<float>(half & 0x3ff) * 0x1p-24f);  // exact in float32
  const uint32_t bias = 112u << 23;                                                   // 127 - 15
  const uint32_t other = (magnitude << 13) + bias + (bias & is_large);
  return bits_to_float(sign | (small & is_small) | (other & ~is_small));
}

// Rounds to nearest even; overflow gives infinity, NaN stays NaN. By masks, as above; the upper half is 0.
static inline uint32_t f32_to_wide_f16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const int32_t ordered = static_cast<int32_t>(magnitude);                      // SSE2 compares signed numbers
  const uint32_t is_small = 0u - static_cast<uint32_t>(ordered < 0x38800000);   // under 2^-14: subnormal half
  const uint32_t is_large = 0u - static_cast<uint32_t>(ordered >= 0x477ff000);  // 65520: half way past the largest
  const uint32_t is_nan = 0u - static_cast<uint32_t>(ordered > 0x7f800000);
  // One ulp of a float in [0.5, 1) is 2^-24, the step of subnormal halves, so this addition does the rounding.
  const uint32_t small = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t large = 0x7c00u | ((0x200u | ((magnitude >> 13) & 0x3ffu)) & is_nan);
  const uint32_t finite = (small & is_small) | (normal & ~is_small);
  return ((bits >> 16) & 0x8000u) | (large & is_large) | (finite & ~is_large);
}

static inline uint16_t f32_to_f16(float value) { return static_cast<uint16_t>(f32_to_wide_f16(value)); }

static inline float bf16_to_f32(uint16_t value) { return bits_to_float(static_cast<uint32_t>(value) << 16); }

// 2^(exponent - 128), half of what the E8M0 byte means. 255, a NaN in the OCP standard, is a number here, as it is in
// the `gguf` package.
static inline float e8m0_half_to_f32(uint8_t exponent) {
  if (exponent < 2) return bits_to_float(0x00200000u << exponent);  // 2^-128 and 2^-127 are subnormal
  return bits_to_float(static_cast<uint32_t>(exponent - 1) << 23);
}

// Rounds to nearest even; NaN stays NaN.
static inline uint16_t f32_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace kt
