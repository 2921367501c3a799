#include "executor/multiply.h"

#include <algorithm>
#include <numeric>

#include "executor/activation_layout.h"

namespace kt {
namespace {

// K of one call of a tile kernel, about: the activations of 256 tokens are then 512 KiB, which stay in L2 while the
// weights of all rows and matrices pass by. It depends on nothing but the types, as results depend on it.
constexpr int kTilePartK = 1024;

}  // namespace

void multiply_vectors(const ExpertWeights& weights, const WorkItem& item, int expert, const VectorInput& input,
                      float* output, int stride) {
  weights.kernels().gemm({.weights = weights.panel(item.slice, expert, item.first_row),
                          .panel_bytes = weights.panel_bytes(),
                          .activations = input.rows,
                          .activation_row_bytes = activation_row_bytes(weights.kernels(), weights.k()),
                          .token_rows = input.token_rows,
                          .output = output,
                          .output_stride = static_cast<size_t>(stride),
                          .num_rows = item.num_rows,
                          .num_tokens = input.num_tokens,
                          .k = weights.k(),
                          .next_weights = input.next_weights,
                          .prefetch = input.prefetch});
}

void multiply_tiles(std::initializer_list<TileProduct> products, const WorkItem& item, int expert,
                    const TileInput& input, int stride) {
  const int k = products.begin()->weights->k();
  int granule = tile_granule(input.format);
  for (const TileProduct& product : products) granule = std::lcm(granule, product.weights->block_size());
  const int part = std::max(granule, kTilePartK / granule * granule);
  const auto weights_at = [&](const TileProduct* product, int begin) {
    const ExpertWeights& weights = *product->weights;
    return weights.panel(item.slice, expert, item.first_row) + weights.panel_bytes() * begin / k;
  };
  for (int begin = 0; begin < k; begin += part) {
    const int end = std::min(begin + part, k);
    for (const TileProduct* product = products.begin(); product != products.end(); ++product) {
      const ExpertWeights& weights = *product->weights;
      const uint8_t* next = product + 1 != products.end() ? weights_at(product + 1, begin)
                            : end < k                     ? weights_at(products.begin(), end)
                                                          : input.next_weights;
      const auto gemm = weights.kernels().tile_gemm[static_cast<int>(input.format)];
      gemm({.weights = weights.panel(item.slice, expert, item.first_row),
            .panel_bytes = weights.panel_bytes(),
            .activations = input.groups,
            .group_bytes = input.group_bytes,
            .output = product->output,
            .output_stride = static_cast<size_t>(stride),
            .accumulate = begin > 0,
            .num_rows = item.num_rows,
            .num_tokens = item.num_tokens,
            .group_tokens = input.group_tokens,
            .k = k,
            .k_begin = begin,
            .k_end = end,
            .k_ahead = product == products.begin() ? std::min(end + part, k) : 0,  // by the first, for all
            .next_weights = next});
    }
  }
}

}  // namespace kt
