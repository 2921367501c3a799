// Every function names the instruction set it needs and keeps to intrinsics, so this file needs no flags, and nothing
// of it can replace a function compiled for all CPUs (rule 7 of CONTRIBUTING.md). One file, since the loops are alike.
#include "limits/loops.h"

#include <immintrin.h>

#include "kernels/cpu_features.h"

namespace kt {
namespace {

constexpr int kAccumulators = 8;  // enough to hide the latency of 4 to 6 cycles at two instructions a cycle

// The compiler must take the value for new: else it would compute what does not change once, before the loop.
#define KT_OPAQUE(vector) __asm__ volatile("" : "+v"(vector))

__attribute__((target("avx2"))) void avx2_int8(int rounds) {
  __m256i sums[kAccumulators] = {}, a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2);
  KT_OPAQUE(b);
  for (int round = 0; round < rounds; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < kAccumulators; ++i) {
      KT_OPAQUE(a);
      const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(a, b), _mm256_maddubs_epi16(b, a));
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, b));
    }
  }
  for (__m256i& sum : sums) KT_OPAQUE(sum);
}

__attribute__((target("avx2,fma"))) void avx2_fp32(int rounds) {
  constexpr int kChains = 12;
  __m256 sums[kChains] = {}, a = _mm256_set1_ps(1), b = _mm256_set1_ps(2);
  KT_OPAQUE(a);
  KT_OPAQUE(b);
  for (int round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sums[i] = _mm256_fmadd_ps(a, b, sums[i]);
      KT_OPAQUE(sums[i]);
    }
  }
}

__attribute__((target("avx2,avxvnni"))) void avx_vnni_int8(int rounds) {
  constexpr int kChains = 12;
  __m256i sums[kChains] = {}, a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2);
  KT_OPAQUE(a);
  KT_OPAQUE(b);
  for (int round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sums[i] = _mm256_dpbusd_avx_epi32(sums[i], a, b);
      KT_OPAQUE(sums[i]);
    }
  }
}

#define KT_TARGET_AVX512 target("avx512f,avx512bw,avx512dq,avx512vl")

__attribute__((KT_TARGET_AVX512)) void avx512_int8(int rounds) {
  __m512i sums[kAccumulators] = {}, a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
  KT_OPAQUE(b);
  for (int round = 0; round < rounds; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < kAccumulators; ++i) {
      KT_OPAQUE(a);
      const __m512i pairs = _mm512_add_epi16(_mm512_maddubs_epi16(a, b), _mm512_maddubs_epi16(b, a));
      sums[i] = _mm512_add_epi32(sums[i], _mm512_madd_epi16(pairs, b));
    }
  }
  for (__m512i& sum : sums) KT_OPAQUE(sum);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) void avx512_vnni_int8(int rounds) {
  constexpr int kChains = 12;
  __m512i sums[kChains] = {}, a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
  KT_OPAQUE(a);
  KT_OPAQUE(b);
  for (int round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sums[i] = _mm512_dpbusd_epi32(sums[i], a, b);
      KT_OPAQUE(sums[i]);
    }
  }
}

__attribute__((KT_TARGET_AVX512)) void avx512_fp32(int rounds) {
  constexpr int kChains = 12;
  __m512 sums[kChains] = {}, a = _mm512_set1_ps(1), b = _mm512_set1_ps(2);
  KT_OPAQUE(a);
  KT_OPAQUE(b);
  for (int round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sums[i] = _mm512_fmadd_ps(a, b, sums[i]);
      KT_OPAQUE(sums[i]);
    }
  }
}

// Palette 1: tile i has 16 rows of 64 bytes, for all eight of them.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Not local: GCC 12 tells the optimiser that the instruction reads eight bytes, and stores to the others are then
// dropped.
constexpr TileConfig kTileConfig;

// What tiles 4 to 7 hold: any bytes, or bfloat16 of magnitudes from 0.5 to 2. With zeros products run up to 1.4 times
// as fast, which no kernel's do.
struct alignas(64) TileNumbers {
  uint8_t bytes[4][16 * 64];

  explicit constexpr TileNumbers(bool bfloat16) : bytes() {
    uint32_t state = 1;
    for (auto& tile : bytes)
      for (int i = 0; i < 16 * 64; ++i) {
        state = state * 1664525 + 1013904223;
        const auto byte = static_cast<uint8_t>(state >> 24);
        tile[i] = bfloat16 && i % 2 == 1 ? static_cast<uint8_t>(0x3f | (byte & 0x80)) : byte;
      }
  }
};
constexpr TileNumbers kInt8Numbers(false), kBf16Numbers(true);

__attribute__((target("amx-tile"))) inline void load_operands(const TileNumbers& numbers) {
  _tile_loadconfig(&kTileConfig);
  _tile_loadd(4, numbers.bytes[0], 64);
  _tile_loadd(5, numbers.bytes[1], 64);
  _tile_loadd(6, numbers.bytes[2], 64);
  _tile_loadd(7, numbers.bytes[3], 64);
}

// Four sums of two by two operands: what a kernel with eight tiles can hold. Tile instructions are volatile by
// themselves.
__attribute__((target("amx-tile,amx-int8"))) void amx_int8(int rounds) {
  load_operands(kInt8Numbers);
  for (int round = 0; round < rounds; ++round) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
}

__attribute__((target("amx-tile,amx-bf16"))) void amx_bf16(int rounds) {
  load_operands(kBf16Numbers);
  for (int round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

constexpr size_t kReadStep = 512;

__attribute__((target("avx2"))) uint64_t read_avx2(const uint8_t* begin, size_t bytes) {
  __m256i sums[4] = {};
  for (const uint8_t* end = begin + bytes; begin != end; begin += kReadStep)
#pragma GCC unroll 16
    for (size_t i = 0; i < kReadStep / 32; ++i)
      sums[i % 4] = _mm256_add_epi64(sums[i % 4], _mm256_load_si256(reinterpret_cast<const __m256i*>(begin + 32 * i)));
  const __m256i sum = _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
  return _mm256_extract_epi64(sum, 0) + _mm256_extract_epi64(sum, 1) + _mm256_extract_epi64(sum, 2) +
         _mm256_extract_epi64(sum, 3);
}

__attribute__((KT_TARGET_AVX512)) uint64_t read_avx512(const uint8_t* begin, size_t bytes) {
  __m512i sums[4] = {};
  for (const uint8_t* end = begin + bytes; begin != end; begin += kReadStep)
#pragma GCC unroll 8
    for (size_t i = 0; i < kReadStep / 64; ++i)
      sums[i % 4] = _mm512_add_epi64(sums[i % 4], _mm512_load_si512(begin + 64 * i));
  // By way of memory: GCC 12 takes _mm512_reduce_add_epi64 itself for a use of uninitialised values.
  alignas(64) uint64_t lanes[8];
  _mm512_store_si512(lanes, _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3])));
  uint64_t total = 0;
  for (uint64_t lane : lanes) total += lane;
  return total;
}

uint64_t read_sse2(const uint8_t* begin, size_t bytes) {
  __m128i sums[2] = {};
  for (const uint8_t* end = begin + bytes; begin != end; begin += 32)
    for (size_t i = 0; i < 2; ++i)
      sums[i] = _mm_add_epi64(sums[i], _mm_load_si128(reinterpret_cast<const __m128i*>(begin + 16 * i)));
  const __m128i sum = _mm_add_epi64(sums[0], sums[1]);
  return _mm_cvtsi128_si64(sum) + _mm_cvtsi128_si64(_mm_unpackhi_epi64(sum, sum));
}

// Two operations for each pair of bytes that one instruction multiplies and adds; avx2_int8 has two such
// instructions a step.
constexpr double kTileInt8 = 2.0 * 16 * 16 * 64, kTileBf16 = 2.0 * 16 * 16 * 32;

}  // namespace

const PeakLoop kPeakLoops[] = {
    {"amx_int8", kAmxTile, 4 * kTileInt8, amx_int8},
    {"avx512_vnni_int8", kAvx512 | kAvx512Vnni, 12 * 2.0 * 64, avx512_vnni_int8},
    {"avx512_int8", kAvx512, kAccumulators * 2 * 2.0 * 64, avx512_int8},
    {"avx_vnni_int8", kAvx2 | kAvxVnni, 12 * 2.0 * 32, avx_vnni_int8},
    {"avx2_int8", kAvx2, kAccumulators * 2 * 2.0 * 32, avx2_int8},
    {"amx_bf16", kAmxTile | kAmxBf16, 4 * kTileBf16, amx_bf16},
    {"avx512_fp32", kAvx512, 12 * 2.0 * 16, avx512_fp32},
    {"avx2_fp32", kAvx2 | kFma, 12 * 2.0 * 8, avx2_fp32},
};
const int kNumPeakLoops = sizeof(kPeakLoops) / sizeof(kPeakLoops[0]);

uint64_t read_bytes(const uint8_t* begin, size_t bytes, uint32_t features) {
  if (features & kAvx512) return read_avx512(begin, bytes);
  if (features & kAvx2) return read_avx2(begin, bytes);
  return read_sse2(begin, bytes);
}

}  // namespace kt
