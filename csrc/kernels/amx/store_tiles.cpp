// Activations to the tiles described in activations.h.
#include <immintrin.h>

#include "kernels/amx/activations.h"
#include "kernels/amx/kernels.h"

namespace kt::KT_ISA_NAMESPACE {

size_t tile_group_bytes(int k) { return static_cast<size_t>(k / 32) * kTileBytes; }

void store_tile_row(const float* x, int k_begin, int n, int token, uint8_t* group) {
  const __m512i order = _mm512_set_epi16(31, 29, 30, 28, 27, 25, 26, 24, 23, 21, 22, 20, 19, 17, 18, 16, 15, 13, 14, 12,
                                         11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0);
  uint8_t* row = group + static_cast<size_t>(k_begin / 32) * kTileBytes + token * kTileRowBytes;
  for (int i = 0; i < n; i += 32, row += kTileBytes) {
    const __m512bh values = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i));
    _mm512_storeu_si512(row, _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(values)));
  }
}

}  // namespace kt::KT_ISA_NAMESPACE
