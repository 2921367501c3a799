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

constexpr int kGroupK = 32;  // an activation block
constexpr int kMaxTokens =
    64;  // tokens that share one unpacking; their sums, 4 KiB a panel, stay in the first level cache
// Prefetch::kFar. 16 threads of an Emerald Rapids, one token, from DRAM, in one run: against this, 2048 to 8192 into
// the first level ran at 0.85 to 0.95, 8192 and 32768 into the second at 0.97 and 0.94, none at 0.7. Where two threads
// have twice the bandwidth each, kNear runs at 1.1 to 1.2.
constexpr size_t kFarPrefetchBytes = 16384;

using Sums = float[kMaxTokens][kPanelRows];

template <class Unpack>
inline void unpack_chunk(const uint8_t* panel_blocks, int num_k, Codes& codes) {
  constexpr size_t kPanelBlockBytes = size_t{kPanelRows} * Unpack::kBlockBytes;
  for (int b = 0; b < num_k / Unpack::kBlock; ++b) Unpack::unpack(panel_blocks + b * kPanelBlockBytes, codes, b);
}

// Asks for the weights of group g of the chunk at `ahead`: a few lines between the computations of each group, as more
// than the processor has buffers for would hold it up.
template <class Unpack>
inline void prefetch_group(const uint8_t* ahead, int g, Prefetch prefetch) {
  constexpr size_t kGroupBytes = size_t{kPanelRows} * Unpack::kBlockBytes * kGroupK / Unpack::kBlock;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(ahead) + g * kGroupBytes;  // may lie past the end of the tensor
  if (prefetch == Prefetch::kNear)
    for (size_t i = 0; i < kGroupBytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(begin + i), _MM_HINT_T0);
  else
    for (size_t i = 0; i < kGroupBytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(begin + i), _MM_HINT_T1);
}

// Where the weights stand that are to be asked for with those at `offset` of panel `panel` of the kPanels from row
// `row` on: in the same panel, in the next ones of the call, or in what is read after it; nullptr: nowhere known.
template <class Unpack, int kPanels>
inline const uint8_t* weights_ahead(const GemmParams& p, int row, int panel, size_t offset) {
  constexpr size_t kChunkBytes = size_t{kPanelRows} * Unpack::kBlockBytes * kMaxCodesK / Unpack::kBlock;
  const size_t ahead = offset + (p.prefetch == Prefetch::kNear ? kChunkBytes : kFarPrefetchBytes);
  const uint8_t* base = p.weights + static_cast<size_t>(row / kPanelRows + panel) * p.panel_bytes;
  if (ahead < p.panel_bytes) return base + ahead;
  if (row + (kPanels + panel) * kPanelRows < p.num_rows) return base + (kPanels - 1) * p.panel_bytes + ahead;
  return p.next_weights == nullptr ? nullptr
                                   : p.next_weights + (panel - 1) * static_cast<ptrdiff_t>(p.panel_bytes) + ahead;
}

constexpr int kTokenTile = kLanes == 16 ? 6 : 4;
constexpr int kPanelsAtOnce = 2 / kHalves;  // panels of a tile of two vectors

// A tile is T tokens times kVectors vectors of rows: as many sums as registers hold, so that a load of activations is
// used kVectors times and one of codes T times. Vector v holds the lanes v % kHalves of panel v / kHalves.
struct Tile {
  const Codes* codes;  // of each panel
  int num_groups;
  const ActivationBlock32* const* x;    // of each token
  Sums* sums;                           // of each panel
  int token;                            // the first one's place in sums
  const uint8_t* ahead[kPanelsAtOnce];  // of each panel, to prefetch; nullptr: nothing, or others did
  Prefetch prefetch;
};

inline const uint8_t* codes_at(const Codes* codes, int quad, int v) {
  return codes[v / kHalves].quads[quad][v % kHalves * kLanes];
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

// products[t][v] = start[t] + the products of kQuads quads, from `first` on, and the activations q[t].
template <class Unpack, int T, int kVectors, int kQuads>
inline void multiply_quads(const Codes* codes, int first, const int8_t* const* q, const Ints* start,
                           Ints (*products)[kVectors]) {
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < kVectors; ++v) products[t][v] = start[t];
#pragma GCC unroll 8
  for (int i = 0; i < kQuads; ++i) {
    Ints quads[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      quads[v] = load(codes_at(codes, first + i, v));
      if constexpr (Unpack::kSigned) quads[v] = bit_xor(quads[v], splat(0x80808080));  // + 128: unsigned
    }
    for (int t = 0; t < T; ++t) {
      const Ints x = splat_at(q[t] + 4 * i);
      for (int v = 0; v < kVectors; ++v) products[t][v] = dot(products[t][v], quads[v], x);
    }
  }
}

// What the products start from.
template <bool kSigned>
inline Ints first_product(const ActivationBlock32& block) {
  return kSigned ? splat_at(&block.neg128_sum) : zero_ints();
}

#else

// Sums of pairs of products fit 16 bits; so many of them may be added before they must widen.
template <class Unpack>
constexpr int kPairsAtOnce = Unpack::kSigned          ? 1
                             : Unpack::kMaxCode <= 16 ? 8
                             : Unpack::kMaxCode <= 32 ? 4
                             : Unpack::kMaxCode <= 64 ? 2
                                                      : 1;

template <class Unpack, int T, int kVectors, int kQuads>
inline void multiply_quads(const Codes* codes, int first, const int8_t* const* q, const Ints*,
                           Ints (*products)[kVectors]) {
  constexpr int kAtOnce = kPairsAtOnce<Unpack> < kQuads ? kPairsAtOnce<Unpack> : kQuads;
  static_assert(Unpack::kSigned || Unpack::kMaxCode * 127 * 2 * kAtOnce <= 32767);
#pragma GCC unroll 8
  for (int begin = 0; begin < kQuads; begin += kAtOnce) {
    Ints pairs[T][kVectors];
#pragma GCC unroll 8
    for (int i = begin; i < begin + kAtOnce; ++i) {
      Ints quads[kVectors];
      for (int v = 0; v < kVectors; ++v) quads[v] = load(codes_at(codes, first + i, v));
      for (int t = 0; t < T; ++t) {
        const Ints x = splat_at(q[t] + 4 * i);
        for (int v = 0; v < kVectors; ++v) {
          const Ints p =
              Unpack::kSigned ? dot_pairs(magnitudes(quads[v]), with_sign_of(x, quads[v])) : dot_pairs(quads[v], x);
          pairs[t][v] = i == begin ? p : add_halves(pairs[t][v], p);
        }
      }
    }
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < kVectors; ++v)
        products[t][v] = begin == 0 ? sum_pairs(pairs[t][v]) : add_ints(products[t][v], sum_pairs(pairs[t][v]));
  }
}

template <bool kSigned>
inline Ints first_product(const ActivationBlock32&) {
  return zero_ints();
}

#endif

// T tokens times num_groups * 32 k. A group's products, times its scale, less its min, are added to the sums.
//   with mins:  scale * (x.scale * products) - min * x.sum
//   relative:   scale * (x.scale * products - kCenter * x.sum)
template <class Unpack, int T, int kVectors>
inline void add_chunk(const Tile& tile) {
  constexpr int kParts = 32 / Unpack::kGroup;
  const auto place = [&](int t, int v) { return tile.sums[v / kHalves][tile.token + t] + v % kHalves * kLanes; };
  Floats sums[T][kVectors];
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < kVectors; ++v) sums[t][v] = load_floats(place(t, v));
  for (int g = 0; g < tile.num_groups; ++g) {
    for (int panel = 0; panel < kVectors / kHalves; ++panel)
      if (tile.ahead[panel] != nullptr) prefetch_group<Unpack>(tile.ahead[panel], g, tile.prefetch);
    for (int part = 0; part < kParts; ++part) {
      const int8_t* q[T];
      Ints start[T], products[T][kVectors];
      for (int t = 0; t < T; ++t) {
        q[t] = tile.x[t][g].q + part * Unpack::kGroup;
        start[t] = first_product<Unpack::kSigned>(tile.x[t][g]);
      }
      multiply_quads<Unpack, T, kVectors, Unpack::kGroup / 4>(tile.codes, 8 * g + part * 4, q, start, products);
      const int group = kParts * g + part;
      for (int t = 0; t < T; ++t) {
        const ActivationBlock32& block = tile.x[t][g];
        const Floats x_scale = splat_float(block.scale);
        const float x_sum = kParts == 1 ? block.sum : block.half_sums[part];
        const Floats min_sum = splat_float(Unpack::kHasMin ? x_sum : Unpack::kCenter * x_sum);
        for (int v = 0; v < kVectors; ++v) {
          const Codes& codes = tile.codes[v / kHalves];
          const int lane = v % kHalves * kLanes;
          const Floats scale = load_floats(codes.scales[group] + lane), product = to_floats(products[t][v]);
          if constexpr (Unpack::kSigned || Unpack::kHasMin)
            sums[t][v] = multiply_add(product, multiply(scale, x_scale), sums[t][v]);
          else
            sums[t][v] = multiply_add(scale, multiply_subtract(product, x_scale, min_sum), sums[t][v]);
          if constexpr (Unpack::kHasMin)
            sums[t][v] = negative_multiply_add(load_floats(codes.mins[group] + lane), min_sum, sums[t][v]);
        }
      }
    }
  }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < kVectors; ++v) store_floats(place(t, v), sums[t][v]);
}

template <class Unpack, int T, int kVectors>
inline void add_last_tokens(const Tile& tile, int rest) {
  if constexpr (T > 0) {
    if (rest == T) return add_chunk<Unpack, T, kVectors>(tile);
    add_last_tokens<Unpack, T - 1, kVectors>(tile, rest);
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

// kPanels panels, from row `row` on, times num_tokens <= kMaxTokens tokens, from token `first` on.
template <class Unpack, int kPanels>
inline void multiply_panels(const GemmParams& p, int row, int first, int num_tokens) {
  alignas(64) Sums sums[kPanels];
  alignas(64) Codes codes[kPanels];
  const ActivationBlock32* x[kMaxTokens];
  for (int t = 0; t < num_tokens; ++t) {
    const size_t activation_row = p.token_rows ? p.token_rows[first + t] : first + t;
    x[t] = reinterpret_cast<const ActivationBlock32*>(p.activations + activation_row * p.activation_row_bytes);
  }
  for (int panel = 0; panel < kPanels; ++panel)
    std::memset(sums[panel], 0, static_cast<size_t>(num_tokens) * sizeof sums[panel][0]);
  const uint8_t* panels = p.weights + static_cast<size_t>(row / kPanelRows) * p.panel_bytes;
  for (int k = 0; k < p.k; k += kMaxCodesK) {
    const int num_k = p.k - k < kMaxCodesK ? p.k - k : kMaxCodesK;
    const int num_groups = num_k / kGroupK;
    const size_t offset = static_cast<size_t>(k / Unpack::kBlock) * kPanelRows * Unpack::kBlockBytes;
    for (int panel = 0; panel < kPanels; ++panel)
      unpack_chunk<Unpack>(panels + panel * p.panel_bytes + offset, num_k, codes[panel]);
    Tile tile{codes, num_groups, x, sums, 0, {}, p.prefetch};
    for (int panel = 0; panel < kPanels; ++panel)
      tile.ahead[panel] = weights_ahead<Unpack, kPanels>(p, row, panel, offset);
    for (; tile.token + kTokenTile <= num_tokens; tile.token += kTokenTile, tile.x += kTokenTile) {
      add_chunk<Unpack, kTokenTile, kPanels * kHalves>(tile);
      for (const uint8_t*& ahead : tile.ahead) ahead = nullptr;
    }
    add_last_tokens<Unpack, kTokenTile - 1, kPanels * kHalves>(tile, num_tokens - tile.token);
    for (int t = 0; t < num_tokens; ++t) x[t] += num_groups;
  }
  for (int panel = 0; panel < kPanels; ++panel) {
    const int begin = row + panel * kPanelRows;
    const int num_rows = p.num_rows - begin < kPanelRows ? p.num_rows - begin : kPanelRows;
    for (int t = 0; t < num_tokens; ++t)
      write_sums(sums[panel][t], p.output + static_cast<size_t>(first + t) * p.output_stride + begin, num_rows);
  }
}

template <class Unpack>
inline void gemm_int(const GemmParams& p) {
  for (int first = 0; first < p.num_tokens; first += kMaxTokens) {
    const int num_tokens = p.num_tokens - first < kMaxTokens ? p.num_tokens - first : kMaxTokens;
    int row = 0;
    if constexpr (kPanelsAtOnce == 2)
      for (; row + kPanelRows < p.num_rows; row += 2 * kPanelRows)
        multiply_panels<Unpack, 2>(p, row, first, num_tokens);
    for (; row < p.num_rows; row += kPanelRows) multiply_panels<Unpack, 1>(p, row, first, num_tokens);
  }
}

}  // namespace
}  // namespace kt::KT_ISA_NAMESPACE
