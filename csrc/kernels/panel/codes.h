// What every quantised type becomes before it is computed with: small integers and float32 scales, 16 rows side by
// side.
#pragma once

#ifdef __AVX512F__
#include "kernels/panel/vec_avx512.h"
#else
#include "kernels/panel/vec_avx2.h"
#endif
#include "kernels/panel.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

constexpr int kMaxCodesK = 256;
constexpr int kHalves = kPanelRows / kLanes;  // vectors for the 16 rows of a panel

// Up to 256 k of a panel, in the first level cache between unpacking and use.
//   unsigned types: weight = scale * code - min, code 0..Unpack::kMaxCode
//   signed types:   weight = scale * code, code int8
// A group (Unpack::kGroup weights of a row, 16 or 32) has one scale and, with Unpack::kHasMin, one min. kCenter is the
// code in the middle; unsigned codes without mins are relative to it: weight = scale * (code - kCenter).
struct alignas(64) Codes {
  uint8_t quads[kMaxCodesK / 4][kPanelRows][4];  // 4 consecutive k of each row
  float scales[kMaxCodesK / 16][kPanelRows];     // [group][row]
  float mins[kMaxCodesK / 16][kPanelRows];       // with kHasMin
};

// The lanes of one vector of rows within the units of a panel block: unit u of the field at `offset`, vector h.
template <int kUnit = 4>
inline const uint8_t* unit(const uint8_t* block, int offset, int u, int h) {
  return block + kPanelRows * offset + (u * kPanelRows + h * kLanes) * kUnit;
}

template <int j>
inline Floats byte_to_floats(Ints v) {  // byte j of each lane, unsigned
  if constexpr (j == 3)
    return to_floats(shift_right<24>(v));
  else
    return to_floats(bit_and(shift_right<8 * j>(v), splat(0xff)));
}

template <int j>
inline Floats signed_byte_to_floats(Ints v) {
  return to_floats(shift_right_signed<24>(shift_left<24 - 8 * j>(v)));
}

inline Ints low_nibbles(Ints v) { return bit_and(v, splat(0x0f0f0f0f)); }
inline Ints high_nibbles(Ints v) { return bit_and(shift_right<4>(v), splat(0x0f0f0f0f)); }

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
