// The vector GEMM of all quantised types: unpack up to 256 k of a panel once, use them for every token.
//
// Lanes are rows, so a group of 32 k costs a token 8 integer dot products of 4, one conversion and three float
// operations, whatever the type; sums over k are exact within a group and float32 beyond, always in the same order.
#pragma once

#include "kernels/activation_blocks.h"
#include "kernels/kernel_table.h"
#include "kernels/panel/codes.h"

namespace kt::KT_ISA_NAMESPACE {
namespace {

constexpr int kGroupK = 32;     // an activation block
constexpr int kMaxTokens = 64;  // tokens that share one unpacking; their sums, 4 KiB, stay in the first level cache
constexpr int kPrefetchBytes = 4096;  // how far ahead of use weights are asked for; measured, see benchmarks/RESULTS.md

using Sums = float[kMaxTokens][kPanelRows];

template <class Unpack>
inline void unpack_chunk(const uint8_t* panel_blocks, int num_k, Codes& codes) {
  constexpr size_t kPanelBlockBytes = size_t{kPanelRows} * Unpack::kBlockBytes;
  for (int b = 0; b < num_k / Unpack::kBlock; ++b) {
    const uint8_t* block = panel_blocks + b * kPanelBlockBytes;
    const uintptr_t ahead = reinterpret_cast<uintptr_t>(block) + kPrefetchBytes;  // may lie past the end of the tensor
    for (size_t i = 0; i < kPanelBlockBytes; i += 64)
      _mm_prefetch(reinterpret_cast<const char*>(ahead + i), _MM_HINT_T0);
    Unpack::unpack(block, codes, b);
  }
}

// products: what the integers of a group add up to, times the group's scale, less its min.
template <class Unpack>
inline Floats add_products(Floats total, Ints products, const Codes& codes, int group, int h, float x_scale,
                           float x_sum) {
  const Floats scale = multiply(load_floats(codes.scales[group] + h * kLanes), splat_float(x_scale));
  total = multiply_add(to_floats(products), scale, total);
  if constexpr (!Unpack::kSigned)
    total = negative_multiply_add(load_floats(codes.mins[group] + h * kLanes), splat_float(x_sum), total);
  return total;
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

// T tokens times num_groups * 32 k of one panel.
template <class Unpack, int T>
inline void add_chunk(const Codes& codes, int num_groups, const ActivationBlock32* const* x, Sums& sums, int token) {
  for (int h = 0; h < kHalves; ++h) {
    Floats totals[T];
    for (int t = 0; t < T; ++t) totals[t] = load_floats(sums[token + t] + h * kLanes);
    for (int g = 0; g < num_groups; ++g) {
      Ints quads[8];
      for (int i = 0; i < 8; ++i) {
        quads[i] = load(codes.quads[8 * g + i][h * kLanes]);
        if constexpr (Unpack::kSigned) quads[i] = bit_xor(quads[i], splat(0x80808080));  // + 128: unsigned
      }
      for (int t = 0; t < T; ++t) {
        const ActivationBlock32& block = x[t][g];
        if constexpr (Unpack::kGroup == 32) {
          Ints products = Unpack::kSigned ? splat_at(&block.neg128_sum) : zero_ints();
          for (int i = 0; i < 8; ++i) products = dot(products, quads[i], splat_at(block.q + 4 * i));
          totals[t] = add_products<Unpack>(totals[t], products, codes, g, h, block.scale, block.sum);
        } else {
          static_assert(Unpack::kGroup == 16 && !Unpack::kSigned);
          Ints first = zero_ints(), second = zero_ints();
          for (int i = 0; i < 4; ++i) {
            first = dot(first, quads[i], splat_at(block.q + 4 * i));
            second = dot(second, quads[4 + i], splat_at(block.q + 16 + 4 * i));
          }
          totals[t] = add_products<Unpack>(totals[t], first, codes, 2 * g, h, block.scale, block.half_sums[0]);
          totals[t] = add_products<Unpack>(totals[t], second, codes, 2 * g + 1, h, block.scale, block.half_sums[1]);
        }
      }
    }
    for (int t = 0; t < T; ++t) store_floats(sums[token + t] + h * kLanes, totals[t]);
  }
}

constexpr int kTokenTile = kLanes == 16 ? 8 : 4;

#else

// Sums of pairs of products fit 16 bits; so many of them may be added before they must widen.
template <class Unpack>
constexpr int kPairsAtOnce = Unpack::kSigned          ? 1
                             : Unpack::kMaxCode <= 16 ? 8
                             : Unpack::kMaxCode <= 32 ? 4
                             : Unpack::kMaxCode <= 64 ? 2
                                                      : 1;

// T tokens times kQuads quads of one group, of all rows: products[t][h].
template <class Unpack, int T, int kQuads>
inline void multiply_quads(const uint8_t (*quads)[kPanelRows][4], const int8_t* const* q, Ints (*products)[kHalves]) {
  constexpr int kAtOnce = kPairsAtOnce<Unpack> < kQuads ? kPairsAtOnce<Unpack> : kQuads;
  static_assert(Unpack::kSigned || Unpack::kMaxCode * 127 * 2 * kAtOnce <= 32767);
  for (int first = 0; first < kQuads; first += kAtOnce) {
    Ints pairs[T][kHalves];
    for (int i = first; i < first + kAtOnce; ++i)
      for (int h = 0; h < kHalves; ++h) {
        const Ints codes = load(quads[i][h * kLanes]);
        for (int t = 0; t < T; ++t) {
          const Ints x = splat_at(q[t] + 4 * i);
          const Ints p = Unpack::kSigned ? dot_pairs(magnitudes(codes), with_sign_of(x, codes)) : dot_pairs(codes, x);
          pairs[t][h] = i == first ? p : add_halves(pairs[t][h], p);
        }
      }
    for (int t = 0; t < T; ++t)
      for (int h = 0; h < kHalves; ++h)
        products[t][h] = first == 0 ? sum_pairs(pairs[t][h]) : add_ints(products[t][h], sum_pairs(pairs[t][h]));
  }
}

template <class Unpack, int T>
inline void add_chunk(const Codes& codes, int num_groups, const ActivationBlock32* const* x, Sums& sums, int token) {
  constexpr int kParts = 32 / Unpack::kGroup;
  for (int g = 0; g < num_groups; ++g)
    for (int part = 0; part < kParts; ++part) {
      const int8_t* q[T];
      for (int t = 0; t < T; ++t) q[t] = x[t][g].q + part * Unpack::kGroup;
      Ints products[T][kHalves];
      multiply_quads<Unpack, T, Unpack::kGroup / 4>(codes.quads + 8 * g + part * 4, q, products);
      for (int t = 0; t < T; ++t)
        for (int h = 0; h < kHalves; ++h) {
          const ActivationBlock32& block = x[t][g];
          float* sum = sums[token + t] + h * kLanes;
          store_floats(sum, add_products<Unpack>(load_floats(sum), products[t][h], codes, kParts * g + part, h,
                                                 block.scale, kParts == 1 ? block.sum : block.half_sums[part]));
        }
    }
}

constexpr int kTokenTile = kLanes == 16 ? 4 : 2;

#endif

template <class Unpack, int T>
inline void add_last_tokens(const Codes& codes, int num_groups, const ActivationBlock32* const* x, Sums& sums,
                            int token, int rest) {
  if constexpr (T > 0) {
    if (rest == T) return add_chunk<Unpack, T>(codes, num_groups, x, sums, token);
    add_last_tokens<Unpack, T - 1>(codes, num_groups, x, sums, token, rest);
  }
}

// sums: [num_rows <= 16] of one token -> output
inline void write_sums(const float* sums, float* output, int num_rows) {
  if (num_rows == kPanelRows) {
    for (int h = 0; h < kHalves; ++h) store_floats(output + h * kLanes, load_floats(sums + h * kLanes));
  } else {
    std::memcpy(output, sums, static_cast<size_t>(num_rows) * sizeof(float));
  }
}

template <class Unpack>
inline void gemm_int(const GemmParams& p) {
  alignas(64) Sums sums;
  alignas(64) Codes codes;
  const ActivationBlock32* x[kMaxTokens];
  for (int first = 0; first < p.num_tokens; first += kMaxTokens) {
    const int num_tokens = p.num_tokens - first < kMaxTokens ? p.num_tokens - first : kMaxTokens;
    for (int row = 0; row < p.num_rows; row += kPanelRows) {
      for (int t = 0; t < num_tokens; ++t) {
        const size_t activation_row = p.token_rows ? p.token_rows[first + t] : first + t;
        x[t] = reinterpret_cast<const ActivationBlock32*>(p.activations + activation_row * p.activation_row_bytes);
      }
      std::memset(sums, 0, static_cast<size_t>(num_tokens) * sizeof sums[0]);
      const uint8_t* panel = p.weights + static_cast<size_t>(row / kPanelRows) * p.panel_bytes;
      for (int k = 0; k < p.k; k += kMaxCodesK) {
        const int num_k = p.k - k < kMaxCodesK ? p.k - k : kMaxCodesK;
        const int num_groups = num_k / kGroupK;
        unpack_chunk<Unpack>(panel + static_cast<size_t>(k / Unpack::kBlock) * kPanelRows * Unpack::kBlockBytes, num_k,
                             codes);
        int t = 0;
        for (; t + kTokenTile <= num_tokens; t += kTokenTile)
          add_chunk<Unpack, kTokenTile>(codes, num_groups, x + t, sums, t);
        add_last_tokens<Unpack, kTokenTile - 1>(codes, num_groups, x + t, sums, t, num_tokens - t);
        for (t = 0; t < num_tokens; ++t) x[t] += num_groups;
      }
      const int num_rows = p.num_rows - row < kPanelRows ? p.num_rows - row : kPanelRows;
      for (int t = 0; t < num_tokens; ++t)
        write_sums(sums[t], p.output + static_cast<size_t>(first + t) * p.output_stride + row, num_rows);
    }
  }
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
