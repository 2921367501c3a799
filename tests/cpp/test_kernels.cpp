// Every table and every type: the GEMM and the quantisation of its activations.
#include <algorithm>

#include "random_data.h"
#include "tolerances.h"

namespace kt::test {
namespace {

// f(table, kernels) for each type of each table that runs here.
template <class F>
void for_each_kernel(F f) {
  for (const KernelTable* table : runnable_tables())
    for (int i = 0; i < table->num_types; ++i) f(*table, table->types[i]);
}

std::string label(const KernelTable& table, const TypeKernels& kernels) {
  return table_name(table) + " " + ggml_type_info(kernels.type).name;
}

// One GEMM against double precision; checks the padding of the output too.
void check_gemm(const std::string& name, const TypeKernels& kernels, int num_rows, int num_tokens, int k, bool gather) {
  const Weights w = random_weights(kernels.type, num_rows, k);
  const int num_activation_rows = gather ? random_int(1, num_tokens + 3) : num_tokens;
  const Activations a =
      store_activations(kernels, random_floats(static_cast<size_t>(num_activation_rows) * k, 3.0f), k);
  const std::vector<int32_t> rows = random_rows(num_tokens, num_activation_rows);
  const int stride = num_rows + random_int(0, 5);
  const auto output = run_gemm(kernels, w, a, gather ? rows.data() : nullptr, num_tokens, stride, 0, num_rows);

  Worst same_numbers, true_activations;
  double error_square = 0, typical_square = 0;
  for (int t = 0; t < num_tokens; ++t) {
    const size_t x_at = static_cast<size_t>(gather ? rows[t] : t) * k;
    for (int r = 0; r < stride; ++r) {
      const int64_t at = static_cast<int64_t>(t) * stride + r;
      const float got = output[at];
      if (r >= num_rows) {
        CHECK(got == kUntouched, name << " wrote past the row, token " << t << " column " << r);
        continue;
      }
      double want = 0, magnitude = 0, want_true = 0, half_steps = 0, w_square = 0, x_square = 0;
      for (int i = 0; i < k; ++i) {
        const size_t w_at = static_cast<size_t>(r) * k + i;
        const double value = w.values[w_at], offset = w.offsets[w_at];
        want += value * a.decoded[x_at + i];
        magnitude += (std::fabs(value - offset) + std::fabs(offset)) * std::fabs(a.decoded[x_at + i]);
        want_true += value * a.x[x_at + i];
        half_steps += std::fabs(value) * a.scales[x_at + i] * kHalfStep;
        w_square += value * value;
        x_square += static_cast<double>(a.x[x_at + i]) * a.x[x_at + i];
      }
      same_numbers.compare(got, want, dot_limit(k, magnitude), at);
      true_activations.compare(got, want_true, dot_limit(k, magnitude) + half_steps, at);
      error_square += (got - want_true) * (got - want_true);
      typical_square += w_square * x_square / k;
    }
  }
  const std::string shape = name + " rows " + std::to_string(num_rows) + " tokens " + std::to_string(num_tokens) +
                            " k " + std::to_string(k) + (gather ? " gathered" : "");
  CHECK_WORST(same_numbers, shape << ", decoded activations");
  CHECK_WORST(true_activations, shape << ", float32 activations");
  const bool exact = kernels.activation_format == ActivationFormat::F32;
  if (!gather && num_tokens >= 48) {  // enough independent activations for a mean
    const double error = std::sqrt(error_square / typical_square);
    CHECK(error < (exact ? kFloatActivationError : kInt8ActivationError), shape << ", relative error " << error);
  }
}

TEST(gemm_for_every_number_of_tokens) {
  for_each_kernel([](const KernelTable& table, const TypeKernels& kernels) {
    for (int num_tokens = 1; num_tokens <= 33; ++num_tokens)
      check_gemm(label(table, kernels), kernels, random_int(1, 19), num_tokens, 256, num_tokens % 2 == 0);
  });
}

TEST(gemm_for_every_width) {
  for_each_kernel([](const KernelTable& table, const TypeKernels& kernels) {
    const int block = ggml_type_info(kernels.type).block_size;
    for (int k : {256, 512, 768, 1408, 1536, 2048, 4096, 7168})
      if (k % block == 0) check_gemm(label(table, kernels), kernels, 17, random_int(1, 6), k, true);
    check_gemm(label(table, kernels), kernels, 16, 48, 2048, false);
    if (block < 256)
      for (int k = block; k < 80 * block && k < 1400; k += block)
        check_gemm(label(table, kernels), kernels, 3, random_int(1, 5), k, false);
  });
}

TEST(no_rows_and_no_tokens) {
  for_each_kernel([](const KernelTable& table, const TypeKernels& kernels) {
    const Weights w = random_weights(kernels.type, 1, 256);
    const Activations a = store_activations(kernels, random_floats(256), 256);
    CHECK(run_gemm(kernels, w, a, nullptr, 0, 4, 0, 1).empty(), label(table, kernels));
    for (float value : run_gemm(kernels, w, a, nullptr, 1, 4, 0, 0)) CHECK(value == kUntouched, label(table, kernels));
  });
}

// A token gives the same bits alone, in any batch, at any place in it, and however the weight rows are cut.
TEST(results_do_not_depend_on_the_batch) {
  for_each_kernel([](const KernelTable& table, const TypeKernels& kernels) {
    const int k = 256 * random_int(1, 9), num_rows = 21, num_activation_rows = 9;
    const Weights w = random_weights(kernels.type, num_rows, k);
    const Activations a = store_activations(kernels, random_floats(static_cast<size_t>(num_activation_rows) * k), k);
    std::vector<std::vector<float>> alone;
    for (int32_t row = 0; row < num_activation_rows; ++row)
      alone.push_back(run_gemm(kernels, w, a, &row, 1, num_rows, 0, num_rows));
    for (int num_tokens = 1; num_tokens <= 13; ++num_tokens) {
      const auto rows = random_rows(num_tokens, num_activation_rows);
      const int cut = kernels.panel_rows * random_int(0, (num_rows - 1) / kernels.panel_rows);
      const auto output = run_gemm(kernels, w, a, rows.data(), num_tokens, num_rows, cut, num_rows);
      for (int t = 0; t < num_tokens; ++t)
        CHECK(std::memcmp(&output[static_cast<size_t>(t) * num_rows], &alone[rows[t]][cut],
                          static_cast<size_t>(num_rows - cut) * sizeof(float)) == 0,
              label(table, kernels) << " k " << k << " token " << t << " of " << num_tokens << " rows from " << cut);
    }
  });
}

TEST(nan_and_infinity_stay_in_their_own_rows) {
  for_each_kernel([](const KernelTable& table, const TypeKernels& kernels) {
    const int k = 768, num_rows = 11, num_tokens = 10;
    const Weights w = random_weights(kernels.type, num_rows, k);
    const auto clean = random_floats(static_cast<size_t>(num_tokens) * k);
    auto dirty = clean;
    const float bad[3] = {NAN, INFINITY, -INFINITY};
    std::vector<bool> is_bad(num_tokens);
    for (float value : bad) {
      const int t = random_int(0, num_tokens - 1);
      is_bad[t] = true;
      dirty[static_cast<size_t>(t) * k + random_int(0, k - 1)] = value;
    }
    const auto want =
        run_gemm(kernels, w, store_activations(kernels, clean, k), nullptr, num_tokens, num_rows, 0, num_rows);
    const auto got =
        run_gemm(kernels, w, store_activations(kernels, dirty, k), nullptr, num_tokens, num_rows, 0, num_rows);
    const bool quantised = kernels.activation_format != ActivationFormat::F32;
    for (int t = 0; t < num_tokens; ++t) {
      for (int r = 0; r < num_rows; ++r) {
        const size_t at = static_cast<size_t>(t) * num_rows + r;
        if (is_bad[t])
          CHECK(quantised ? std::isnan(got[at]) : !std::isfinite(got[at]), label(table, kernels) << " hid a bad row");
        else
          CHECK(float_to_bits(got[at]) == float_to_bits(want[at]), label(table, kernels) << " token " << t);
      }
    }
  });
}

// f(table, kernels, format) for each format that a type of a table which runs here has tile kernels for.
template <class F>
void for_each_tile_kernel(F f) {
  for_each_kernel([&](const KernelTable& table, const TypeKernels& kernels) {
    for (TileFormat format : {TileFormat::BF16, TileFormat::INT8_256})
      if (has_tile_gemm(kernels, format)) f(table, kernels, format);
  });
}

std::string tile_label(const KernelTable& table, const TypeKernels& kernels, TileFormat format) {
  return label(table, kernels) + (format == TileFormat::BF16 ? " bfloat16 tiles" : " int8 tiles");
}

// The tile kernels against double precision. The limit is on the error of the whole result: single ones may be near 0.
void check_tile_gemm(const KernelTable& table, const TypeKernels& kernels, TileFormat format, int num_rows,
                     int num_tokens, int k) {
  const Weights w = random_weights(kernels.type, num_rows, k);
  const StoredWeights stored = store_weights(kernels, w);
  const std::vector<float> x = random_floats(static_cast<size_t>(num_tokens) * k, 3.0f);
  const size_t group_bytes = table.tile_group_bytes(format, k);
  const int granule = tile_granule(format);
  const int group_tokens = num_tokens > 256 || random_int(0, 1) == 0 ? kTileTokens : tile_group_tokens(num_tokens);
  std::vector<uint8_t> storage(group_bytes * ((num_tokens + group_tokens - 1) / group_tokens) + 63);
  for (uint8_t& byte : storage) byte = static_cast<uint8_t>(rng()());  // whatever was there before
  auto* groups = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(storage.data()) + 63) / 64 * 64);
  for (int t = 0; t < num_tokens; ++t)
    for (int begin = 0; begin < k;) {
      const int n = std::min(k - begin, granule * random_int(1, 8));
      table.store_tile_row(format, x.data() + static_cast<size_t>(t) * k + begin, begin, n, k, t % group_tokens,
                           groups + group_bytes * (t / group_tokens));
      begin += n;
    }
  const int stride = num_rows + random_int(0, 5);
  std::vector<float> output(static_cast<size_t>(num_tokens) * stride, kUntouched);
  const int block = std::max(granule, ggml_type_info(kernels.type).block_size);
  const int middle = random_int(0, 1) == 0 ? k : std::min(k, block * random_int(1, 12));
  for (const auto& [begin, end] : {std::pair{0, middle}, std::pair{middle, k}}) {
    if (begin == end) continue;
    TileGemmParams params;
    params.weights = stored.panels;
    params.panel_bytes = stored.panel_bytes;
    params.activations = groups;
    params.group_bytes = group_bytes;
    params.output = output.data();
    params.output_stride = static_cast<size_t>(stride);
    params.accumulate = begin > 0;
    params.num_rows = num_rows;
    params.num_tokens = num_tokens;
    params.group_tokens = group_tokens;
    params.k = k;
    params.k_begin = begin;
    params.k_end = end;
    kernels.tile_gemm[static_cast<int>(format)](params);
  }
  double error_square = 0, square = 0, fourth = 0;
  for (int t = 0; t < num_tokens; ++t)
    for (int r = 0; r < stride; ++r) {
      const float got = output[static_cast<size_t>(t) * stride + r];
      if (r >= num_rows) {
        CHECK(got == kUntouched, table_name(table) << " wrote past the row, token " << t << " column " << r);
        continue;
      }
      double want = 0, magnitude = 0;
      for (int i = 0; i < k; ++i) {
        const double value = w.values[static_cast<size_t>(r) * k + i], activation = x[static_cast<size_t>(t) * k + i];
        want += value * activation;
        magnitude += value * value * 9;
      }
      error_square += (got - want) * (got - want);
      square += magnitude;  // of a typical result: a single one may be near 0 by chance
      fourth += magnitude * magnitude;
    }
  const double error = std::sqrt(error_square / square);
  // The spread of few samples, which are fewer yet where some rows are larger than others.
  const double few = 1 + 3 / std::sqrt(square * square / fourth);
  const double limit = few * (format == TileFormat::BF16 ? kTileErrorBf16 : kTileErrorInt8);
  CHECK(error < limit, tile_label(table, kernels, format) << " rows " << num_rows << " tokens " << num_tokens << " k "
                                                          << k << ": relative error " << error);
}

TEST(tile_gemm) {
  for_each_tile_kernel([](const KernelTable& table, const TypeKernels& kernels, TileFormat format) {
    const int block = ggml_type_info(kernels.type).block_size;
    for (int num_tokens : {1, 2, 7, 15, 16, 17, 31, 32, 33, 50, 64})
      check_tile_gemm(table, kernels, format, random_int(1, 70), num_tokens, 256 * random_int(1, 6));
    for (int k : {256, 512, 1408, 2048, 2304, 7168})
      if (k % block == 0) check_tile_gemm(table, kernels, format, 48, 20, k);
    if (block < 256)
      for (int k : {32, 64, 96, 160, 1056, 1120}) check_tile_gemm(table, kernels, format, 33, 18, k);
    check_tile_gemm(table, kernels, format, 16, 300, 512);
  });
}

// A scale that is NaN or infinite, as in a damaged file, makes no number of its own row, and touches no other.
TEST(tiles_of_a_scale_that_is_no_number) {
  for_each_tile_kernel([](const KernelTable& table, const TypeKernels& kernels, TileFormat format) {
    // Where the blocks have a float16 scale.
    const GgmlType first[] = {GgmlType::Q4_0, GgmlType::Q8_0, GgmlType::Q4_K, GgmlType::IQ4_XS, GgmlType::IQ2_XXS};
    const bool at_start = std::find(std::begin(first), std::end(first), kernels.type) != std::end(first);
    if (!at_start && kernels.type != GgmlType::Q6_K && kernels.type != GgmlType::Q2_K) return;
    const GgmlTypeInfo& info = ggml_type_info(kernels.type);
    const size_t offset = at_start ? 0 : kernels.type == GgmlType::Q6_K ? 208 : 80;
    const int num_rows = 20, num_tokens = 18, k = 1024, bad_row = random_int(0, num_rows - 1);
    Weights w = random_weights(kernels.type, num_rows, k);
    const size_t bad_block = static_cast<size_t>(random_int(0, k / info.block_size - 1));
    const uint16_t scale = random_int(0, 1) == 0 ? 0x7e00 : 0xfc00;
    std::memcpy(w.storage.data() + 1 + bad_row * w.row_bytes + bad_block * info.block_bytes + offset, &scale, 2);
    const StoredWeights stored = store_weights(kernels, w);
    const size_t group_bytes = table.tile_group_bytes(format, k);
    std::vector<uint8_t> storage(2 * group_bytes + 63);
    auto* groups = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(storage.data()) + 63) / 64 * 64);
    for (int t = 0; t < num_tokens; ++t)
      table.store_tile_row(format, random_floats(k).data(), 0, k, k, t % kTileTokens,
                           groups + group_bytes * (t / kTileTokens));
    std::vector<float> output(static_cast<size_t>(num_tokens) * num_rows);
    TileGemmParams params{};
    params.weights = stored.panels;
    params.panel_bytes = stored.panel_bytes;
    params.activations = groups;
    params.group_bytes = group_bytes;
    params.output = output.data();
    params.output_stride = num_rows;
    params.num_rows = num_rows;
    params.num_tokens = num_tokens;
    params.k = params.k_end = k;
    kernels.tile_gemm[static_cast<int>(format)](params);
    for (size_t i = 0; i < output.size(); ++i)
      CHECK(std::isfinite(output[i]) == (static_cast<int>(i) % num_rows != bad_row),
            tile_label(table, kernels, format)
                << " row " << i % num_rows << ", bad row " << bad_row << ": " << output[i]);
  });
}

// x: [256] under one kind of scale -> its decoded values are within half a step, and sums are those of the quants.
void check_quantised(const std::string& name, const TypeKernels& kernels, const std::vector<float>& x) {
  const int k = static_cast<int>(x.size());
  const Activations a = store_activations(kernels, x, k);
  Worst worst;
  for (int i = 0; i < k; ++i) {
    const int begin = i / kernels.activation_block * kernels.activation_block;
    float max = 0;
    for (int j = begin; j < begin + kernels.activation_block; ++j) max = std::max(max, std::fabs(x[j]));
    const bool exact = kernels.activation_format == ActivationFormat::F32;
    const double limit = exact ? 1e-300 : max < kSmallestMax ? kSmallestMax : max / 127.0 * kHalfStep;
    worst.compare(a.decoded[i], x[i], limit, i);
  }
  CHECK_WORST(worst, name);
  for (int i = 0; i < k && kernels.activation_format != ActivationFormat::F32; ++i) {
    const int q = block_at(a.rows, i).q[i % 32];
    CHECK(std::abs(q) <= 127, name << " quant " << i << " is " << q);
    CHECK(a.scales[i] != 0 || q == 0, name << " quant " << i << " is " << q << " though the scale is 0");
  }
  for (int b = 0; b < k / 32 && kernels.activation_format == ActivationFormat::INT8_32; ++b) {
    const ActivationBlock32& block = block_at(a.rows, 32 * b);
    int halves[2] = {0, 0};
    for (int i = 0; i < 32; ++i) halves[i / 16] += block.q[i];
    for (int half = 0; half < 2; ++half)
      CHECK(block.half_sums[half] == block.scale * static_cast<float>(halves[half]),
            name << " half sum in block " << b);
    CHECK(block.sum == block.scale * static_cast<float>(halves[0] + halves[1]), name << " sum of block " << b);
    CHECK(block.neg128_sum == -128 * (halves[0] + halves[1]), name << " offset of block " << b);
  }
}

TEST(quantised_activations) {
  for_each_kernel([](const KernelTable& table, const TypeKernels& kernels) {
    const std::string name = label(table, kernels);
    for (float scale : {1.0f, 1e-3f, 1e-30f, 1e-36f, 1e-38f, 1e-42f, 1e30f, 3e37f})
      check_quantised(name + " scale " + std::to_string(scale), kernels, random_floats(1024, scale));
    check_quantised(name + " zero", kernels, std::vector<float>(512, 0.0f));
    check_quantised(name + " minus zero", kernels, std::vector<float>(512, -0.0f));
    check_quantised(name + " constant", kernels, std::vector<float>(512, -3.25f));
    check_quantised(name + " largest", kernels, std::vector<float>(512, 3.4e38f));
    std::vector<float> spike(512, 0.01f);
    spike[300] = -100.0f;
    check_quantised(name + " spike", kernels, spike);
  });
}

TEST(a_bad_block_decodes_to_nan_and_its_neighbours_do_not) {
  for_each_kernel([](const KernelTable& table, const TypeKernels& kernels) {
    if (kernels.activation_format == ActivationFormat::F32) return;
    for (float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
      auto x = random_floats(1024);
      const int at = random_int(0, 1023);
      x[at] = bad;
      const Activations a = store_activations(kernels, x, 1024);
      for (int i = 0; i < 1024; ++i)
        CHECK(std::isnan(a.decoded[i]) == (i / kernels.activation_block == at / kernels.activation_block),
              label(table, kernels) << " bad " << at << " seen " << i);
    }
  });
}

TEST(a_row_may_be_quantised_in_pieces) {
  for_each_kernel([](const KernelTable& table, const TypeKernels& kernels) {
    const int k = 2048, block = kernels.activation_block;
    const Activations whole = store_activations(kernels, random_floats(k), k);
    Activations pieces = whole;
    pieces.rows = pieces.storage.data() + (whole.rows - whole.storage.data());
    std::fill(pieces.storage.begin(), pieces.storage.end(), uint8_t{0xab});
    for (int start = 0; start < k;) {
      const int n = std::min(k - start, block * random_int(1, 5));
      kernels.quantize_activations(
          whole.x.data() + start, pieces.rows + static_cast<size_t>(start / block) * kernels.activation_block_bytes, n);
      start += n;
    }
    const size_t bytes = static_cast<size_t>(k / block) * kernels.activation_block_bytes;
    CHECK(std::memcmp(pieces.rows, whole.rows, bytes) == 0, label(table, kernels));
  });
}

}  // namespace
}  // namespace kt::test
