// Words of a codebook, by loads, where gather instructions may be slower. A load puts its word into all lanes, and
// blends, unlike shuffles and inserts, go to any vector port.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kt::KT_ISA_NAMESPACE {
namespace {

inline __m256i everywhere(const uint32_t* word) {
  return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(word)));
}
inline __m256d everywhere(const uint64_t* word) { return _mm256_broadcast_sd(reinterpret_cast<const double*>(word)); }

// words[index] of the two indices of 32 bits in each of `indices`: [4]
inline __m256i eight_words(const uint32_t* words, const uint64_t* indices) {
  __m256i pairs[4];
  for (int i = 0; i < 4; ++i) {
    const __m256i even = everywhere(words + static_cast<uint32_t>(indices[i]));
    pairs[i] = _mm256_blend_epi32(even, everywhere(words + (indices[i] >> 32)), 0xaa);
  }
  return _mm256_blend_epi32(_mm256_blend_epi32(pairs[0], pairs[1], 0x0c), _mm256_blend_epi32(pairs[2], pairs[3], 0xc0),
                            0xf0);
}

// words[index] of the two indices in `low`, then of those in `high`.
inline __m256 four_words(const uint64_t* words, uint64_t low, uint64_t high) {
  const __m256d even = _mm256_blend_pd(everywhere(words + static_cast<uint32_t>(low)),
                                       everywhere(words + static_cast<uint32_t>(high)), 0xc);
  const __m256d odd = _mm256_blend_pd(everywhere(words + (low >> 32)), everywhere(words + (high >> 32)), 0xc);
  return _mm256_castpd_ps(_mm256_blend_pd(even, odd, 0xa));
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
