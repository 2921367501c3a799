#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "executor/layer_check.h"
#include "executor/moe_executor.h"
#include "executor/prefetch_trial.h"
#include "gguf/dequantize.h"
#include "gguf/float_bits.h"
#include "kernels/cpu_features.h"
#include "kernels/dispatch.h"
#include "panel_table.h"
#include "temp_file.h"
#include "test_harness.h"

namespace kt {
namespace {

// A layer of random weights in a file, and the weights they decode to.
struct Layer {
  Layer(GgmlType type, int experts, int hidden, int intermediate)
      : Layer({type, type, type}, experts, hidden, intermediate) {}
  // types: of gate, up and down
  Layer(std::array<GgmlType, 3> types, int experts, int hidden, int intermediate)
      : num_experts(experts), hidden_size(hidden), intermediate_size(intermediate) {
    std::vector<uint8_t> contents;
    for (int i = 0; i < 3; ++i) {
      const int rows = i == 2 ? hidden : intermediate, cols = i == 2 ? intermediate : hidden;
      const size_t bytes = ggml_row_bytes(types[i], cols) * rows * experts;
      ExpertTensor& tensor = *tensors()[i];
      tensor = {types[i], experts, rows, cols, {{"", contents.size(), bytes}}};
      append_weights(contents, types[i], size_t(rows) * cols * experts);
      weights[i].resize(size_t(rows) * cols * experts);
      dequantize(types[i], contents.data() + contents.size() - bytes, weights[i].size(), weights[i].data());
    }
    file = std::make_unique<test::TempFile>(contents);
    for (ExpertTensor* tensor : tensors()) tensor->spans[0].path = file->path();
  }

  // Normal floats, or blocks of random bytes with small float16 scales where the type has them.
  static void append_weights(std::vector<uint8_t>& contents, GgmlType type, size_t count) {
    const GgmlTypeInfo& info = ggml_type_info(type);
    const size_t begin = contents.size();
    contents.resize(begin + count / info.block_size * info.block_bytes);
    for (size_t i = begin; i < contents.size(); i += info.block_bytes) {
      if (type == GgmlType::F32) {
        const float value = test::random_normal();
        std::memcpy(&contents[i], &value, sizeof(value));
      } else if (type == GgmlType::F16) {
        const uint16_t value = f32_to_f16(test::random_normal());
        std::memcpy(&contents[i], &value, sizeof(value));
      } else {
        for (size_t byte = 0; byte < info.block_bytes; ++byte) contents[i + byte] = uint8_t(test::rng()());
        contents[i] = 0x00, contents[i + 1] = 0x24;  // 1/64
        if (type == GgmlType::Q4_K)
          contents[i + 2] = 0x00, contents[i + 3] = 0x30;  // 1/8: the mins' share is taken away
      }
    }
  }

  std::vector<ExpertTensor*> tensors() { return {&spec.gate, &spec.up, &spec.down}; }

  int num_experts, hidden_size, intermediate_size;
  MoELayerSpec spec;
  std::vector<float> weights[3];
  std::unique_ptr<test::TempFile> file;
};

struct Call {
  Call(const Layer& layer, int tokens, int k)
      : num_tokens(tokens), top_k(k), x(size_t(tokens) * layer.hidden_size), output(x.size(), 7.0f) {
    for (float& value : x) value = test::random_normal();
    for (int i = 0; i < tokens * k; ++i) {
      ids.push_back(test::random_int(-1, layer.num_experts - 1));
      weights.push_back(test::random_normal());
    }
  }
  MoEForwardParams params() {
    return {x.data(), ids.data(), weights.data(), output.data(), FloatType::F32, num_tokens, top_k};
  }
  int num_tokens, top_k;
  std::vector<float> x, weights, output;
  std::vector<int32_t> ids;
};

double dot(const float* a, const float* b, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += double(a[i]) * b[i];
  return sum;
}

// Rounded where the executor with test::panel_table() rounds, in parts of K, so that an activation goes to the very
// same bfloat16 number.
float rounded_dot(const float* a, const float* b, int n) {
  float sum = 0;
  for (int begin = 0; begin < n; begin += 1024) sum += float(dot(a + begin, b + begin, std::min(1024, n - begin)));
  return sum;
}

void round_for_tiles(TileFormat format, std::vector<float>& values) {
  for (float& value : values) value = test::rounded_for_tiles(format, value);
}

// Relative L2 error of the output against float64, every `step`-th token. Experts that at least tile_min_tokens of a
// piece's tokens go to have their activations rounded as panel_table()'s tile kernels take them.
double error_of(const Layer& layer, const Call& call, int tile_min_tokens = INT_MAX, int piece = INT_MAX,
                int step = 1) {
  const int h = layer.hidden_size, m = layer.intermediate_size;
  const auto quantised = [](GgmlType type) { return type == GgmlType::Q8_0 || type == GgmlType::Q4_K; };
  const TileFormat input_format =
      quantised(layer.spec.gate.type) && quantised(layer.spec.up.type) ? TileFormat::INT8_256 : TileFormat::BF16;
  std::map<std::pair<int, int>, int> uses;  // (piece, expert) -> tokens
  for (int i = 0; i < call.num_tokens * call.top_k; ++i) ++uses[{i / call.top_k / piece, call.ids[i]}];
  double error = 0, size = 0;
  for (int token = 0; token < call.num_tokens; token += step) {
    std::vector<double> sum(h);
    for (int k = 0; k < call.top_k; ++k) {
      const int64_t expert = call.ids[token * call.top_k + k];
      if (expert < 0 || expert >= layer.num_experts) continue;
      const bool tiles = uses[{token / piece, static_cast<int>(expert)}] >= tile_min_tokens;
      std::vector<float> x(&call.x[size_t(token) * h], &call.x[size_t(token) * h] + h), inner(m);
      if (tiles) round_for_tiles(input_format, x);
      for (int row = 0; row < m; ++row) {
        const float gate = rounded_dot(&layer.weights[0][(expert * m + row) * h], x.data(), h);
        const float up = rounded_dot(&layer.weights[1][(expert * m + row) * h], x.data(), h);
        kernel_tables().back()->silu_mul(&gate, &up, &inner[row], 1);
      }
      if (tiles) round_for_tiles(TileFormat::BF16, inner);
      for (int row = 0; row < h; ++row)
        sum[row] +=
            call.weights[token * call.top_k + k] * dot(&layer.weights[2][(expert * h + row) * m], inner.data(), m);
    }
    for (int row = 0; row < h; ++row) {
      error += std::pow(call.output[size_t(token) * h + row] - sum[row], 2);
      size += sum[row] * sum[row];
    }
  }
  return size > 0 ? std::sqrt(error / size) : std::sqrt(error);
}

// nodes: of each worker; all run on one CPU.
std::vector<WorkerPlace> places(const std::vector<int>& nodes) {
  std::vector<WorkerPlace> result;
  for (int node : nodes) result.push_back({0, node});
  return result;
}

std::unique_ptr<MoEExecutor> make_executor(const std::vector<Layer*>& layers, const std::vector<int>& nodes,
                                           int max_num_tokens, const KernelTable& table = *kernel_tables().back()) {
  auto executor = std::make_unique<MoEExecutor>(
      ExecutorOptions{.workers = places(nodes), .max_num_tokens = max_num_tokens, .table = &table});
  for (Layer* layer : layers) executor->add_layer(layer->spec);
  executor->start_loading();
  while (!executor->load_progress().finished) std::this_thread::yield();
  return executor;
}

std::unique_ptr<MoEExecutor> make_executor(const std::vector<Layer*>& layers, int num_workers, int max_num_tokens) {
  return make_executor(layers, std::vector<int>(num_workers, -1), max_num_tokens);
}

void run(MoEExecutor& executor, int layer, Call& call) {
  executor.submit(layer, call.params());
  executor.wait();
}

TEST(layer_against_float64) {
  Layer first(GgmlType::F32, 5, 48, 40), second(GgmlType::Q8_0, 3, 64, 96);
  for (int num_workers : {1, 2, 5}) {
    const auto executor = make_executor({&first, &second}, num_workers, 16);
    for (int num_tokens : {0, 1, 2, 16, 17, 70}) {
      for (int layer = 0; layer < 2; ++layer) {
        Call call(layer == 0 ? first : second, num_tokens, 1 + layer * 2);
        run(*executor, layer, call);
        const double error = error_of(layer == 0 ? first : second, call);
        CHECK(error < 1e-5, "relative error " << error << ", " << num_tokens << " tokens, layer " << layer);
      }
    }
  }
}

// Experts on either path in one call, of types and sizes that are cut in every way: rows that are no multiple of a
// panel, of a chunk, of a tile; K in several parts.
TEST(tiles_and_vectors) {
  constexpr GgmlType F32 = GgmlType::F32, F16 = GgmlType::F16, Q8_0 = GgmlType::Q8_0, Q4_K = GgmlType::Q4_K;
  Layer layers[] = {{{Q8_0, F32, F16}, 5, 96, 160},
                    {{Q8_0, Q8_0, Q8_0}, 1, 32, 32},
                    {{Q4_K, Q8_0, F32}, 3, 1280, 32},
                    {{F16, Q8_0, Q8_0}, 4, 64, 1056},
                    {{Q4_K, Q4_K, Q8_0}, 2, 256, 288}};
  for (Layer& layer : layers) {
    for (const std::vector<int>& nodes : {std::vector<int>{-1}, {0, 1}, {0, 1, 1, 2, 0}}) {
      const auto executor = make_executor({&layer}, nodes, 64, test::panel_table<3>());
      for (int num_tokens : {1, 3, 9, 64, 70}) {
        Call call(layer, num_tokens, 2);
        run(*executor, 0, call);
        const double error = error_of(layer, call, 3, 64);
        CHECK(error < 1e-5, "relative error " << error << ", " << num_tokens << " tokens, " << nodes.size()
                                              << " workers, hidden size " << layer.hidden_size);
      }
    }
  }
}

TEST(sizes_that_no_tile_takes) {
  Layer layer(GgmlType::F32, 3, 37, 71);
  for (const std::vector<int>& nodes : {std::vector<int>{-1}, {0, 1, 2}}) {
    Call call(layer, 50, 2);
    run(*make_executor({&layer}, nodes, 50, test::panel_table<1>()), 0, call);
    CHECK(error_of(layer, call) < 1e-5, "relative error " << error_of(layer, call));
  }
}

TEST(one_expert_has_all_tokens) {
  Layer layer(GgmlType::Q8_0, 6, 64, 96);
  Call call(layer, 700, 1);
  std::fill(call.ids.begin(), call.ids.end(), 4);
  run(*make_executor({&layer}, {0, 0, 1}, 700, test::panel_table<3>()), 0, call);
  CHECK(error_of(layer, call, 3) < 1e-5, "relative error " << error_of(layer, call, 3));
}

TEST(ids_out_of_range) {
  Layer layer(GgmlType::Q8_0, 3, 32, 32);
  const auto executor = make_executor({&layer}, {0, 1}, 16, test::panel_table<3>());
  Call call(layer, 40, 2);
  for (size_t i = 0; i < call.ids.size(); i += 3) call.ids[i] = i % 2 == 0 ? 3 : INT32_MIN;
  std::fill(call.ids.begin() + 20, call.ids.begin() + 30, -1);
  run(*executor, 0, call);
  CHECK(error_of(layer, call, 3, 16) < 1e-5, "relative error " << error_of(layer, call, 3, 16));
  CHECK(std::all_of(&call.output[10 * 32], &call.output[15 * 32], [](float x) { return x == 0; }), "not zero");
  std::fill(call.ids.begin(), call.ids.end(), -1);
  run(*executor, 0, call);
  CHECK(std::all_of(call.output.begin(), call.output.end(), [](float x) { return x == 0; }), "not zero");
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

TEST(threads_nodes_and_pieces_do_not_change_bits) {
  // The second takes tiles for every expert, so that pieces change no path.
  std::vector<const KernelTable*> tables = {&test::panel_table<0>(), &test::panel_table<1>()};
  for (const KernelTable* table : kernel_tables())
    if ((table->required_features & ~detect_cpu_features()) == 0) tables.push_back(table);
  for (const auto& [hidden, intermediate] : {std::pair{64, 64}, {288, 352}}) {
    Layer layer(GgmlType::Q8_0, 4, hidden, intermediate);
    for (const KernelTable* table : tables) {
      Call call(layer, 90, 3);
      run(*make_executor({&layer}, {-1}, 90, *table), 0, call);
      const std::vector<float> expected = call.output;
      for (const std::vector<int>& nodes : {std::vector<int>{-1, -1}, {0, 1}, {2, 0, 1, 0, 0, 2, 0}}) {
        for (int max_num_tokens : {1, 13, 90}) {
          // A piece of fewer tokens takes another path where there are tile kernels for many.
          if (max_num_tokens < 90 && table->store_tile_row != nullptr && table != tables[1]) continue;
          std::fill(call.output.begin(), call.output.end(), 7.0f);
          run(*make_executor({&layer}, nodes, max_num_tokens, *table), 0, call);
          CHECK(same_bits(call.output, expected),
                table->isa << ", " << nodes.size() << " workers, pieces of " << max_num_tokens);
        }
      }
    }
  }
}

// So many slots that their rows are computed in several passes over the hidden rows.
TEST(passes_do_not_change_bits) {
  Layer layer(GgmlType::F32, 9, 1000, 32);
  for (const KernelTable* table : kernel_tables()) {
    if ((table->required_features & ~detect_cpu_features()) != 0 || table == kernel_tables().back()) continue;
    if (table->store_tile_row != nullptr) continue;  // pieces of it may take another path
    Call call(layer, 4000, 6);
    run(*make_executor({&layer}, {-1}, 50, *table), 0, call);
    const std::vector<float> expected = call.output;
    CHECK(error_of(layer, call, INT_MAX, INT_MAX, 400) < 1e-5, "wrong in one pass");
    std::fill(call.output.begin(), call.output.end(), 7.0f);
    run(*make_executor({&layer}, {0, 1, 1}, 4000, *table), 0, call);
    CHECK(same_bits(call.output, expected), table->isa << ": not the same in passes");
    return;  // one table is enough
  }
}

TEST(storm) {
  Layer layer(GgmlType::F32, 2, 8, 8);
  for (const std::vector<int>& nodes : {std::vector<int>{-1}, {-1, -1, -1}, {0, 1, 1}}) {
    const auto executor = make_executor({&layer}, nodes, 4);
    Call call(layer, 2, 2);
    call.ids = {0, 1, 1, 0};
    for (int i = 0; i < 2000; ++i) {
      std::fill(call.output.begin(), call.output.end(), 7.0f);
      run(*executor, 0, call);
      CHECK(call.output[15] != 7.0f, "call " << i << " was not computed");
    }
    CHECK(error_of(layer, call) < 1e-5, "wrong after many calls");
  }
}

TEST(prefetch_is_chosen_by_time) {
  for (const double near : {0.5, 0.99, 1.5}) {
    int calls = 0;
    const PrefetchChoice choice = faster_prefetch([&](Prefetch way) {
      if (++calls <= 6 || calls % 7 == 0) return 9.0;  // others use the machine too
      return way == Prefetch::kNear ? near : 1.0;
    });
    CHECK((choice.prefetch == Prefetch::kNear) == (near == 0.5), near << ": " << choice.reason);
  }
  Layer layer(GgmlType::F32, 5, 64, 64);
  const auto executor = make_executor({&layer, &layer}, 2, 4);
  CHECK(executor->choose_prefetch(2).find("too few") != std::string::npos, "a layer that fits caches was timed");
  SingleTokens calls(*executor, {{64, 5}, {64, 5}}, 2);
  for (int i = 0; i < 20; ++i) CHECK(calls.seconds() > 0, "no time");
  CHECK(executor->num_invalid_ids() == 0, "experts that do not exist");
}

TEST(destroyed_in_flight) {
  Layer layer(GgmlType::F32, 4, 64, 64);
  for (int i = 0; i < 20; ++i) {
    Call call(layer, 30, 2);
    auto executor = make_executor({&layer}, 2, 30);
    executor->submit(0, call.params());
    executor.reset();
    CHECK(error_of(layer, call) < 1e-5, "the call was not finished");
    auto loading = std::make_unique<MoEExecutor>(ExecutorOptions{"reference", places({-1, -1}), 30});
    loading->add_layer(layer.spec);
    loading->start_loading();
  }
}

TEST(type_without_kernels) {
  Layer layer(GgmlType::F32, 2, 256, 256);
  const KernelTable& reference = *kernel_tables().back();
  KernelTable poor = reference;
  const TypeKernels only = *find_type_kernels(reference, GgmlType::Q8_0);
  poor.isa = "poor";
  poor.types = &only;
  poor.num_types = 1;
  layer.spec.up.type = GgmlType::Q4_K;
  CHECK_ERROR(check_layer(layer.spec, poor, 7), "layer 7, tensor gate", "poor has no kernels for type F32", "Q8_0");
}

// 2^24 experts of 2^24 x 2^24: 2^74 bytes, which in 64 bits is nothing at all, as no span holds.
TEST(sizes_that_overflow) {
  const int size = 1 << 24;
  MoELayerSpec spec;
  for (ExpertTensor* tensor : {&spec.gate, &spec.up, &spec.down}) *tensor = {GgmlType::F32, size, size, size, {}};
  CHECK_ERROR(check_layer(spec, *kernel_tables().back(), 0), "tensor gate", "more than 281474976710656 bytes");
}

// Each expert a tensor of its own, last one first in the file; then pieces that a wrong tensor table could ask for.
TEST(spans) {
  for (GgmlType type : {GgmlType::F32, GgmlType::Q8_0}) {
    Layer layer(type, 3, 64, 64);
    Call call(layer, 8, 2);
    const MoELayerSpec stacked = layer.spec;
    for (ExpertTensor* tensor : layer.tensors()) {
      const FileSpan whole = tensor->spans[0];
      const uint64_t each = whole.bytes / 3;
      tensor->spans.clear();
      for (uint64_t i = 0; i < 3; ++i) tensor->spans.push_back({whole.path, whole.offset + i * each, each});
    }
    run(*make_executor({&layer}, 2, 8), 0, call);
    CHECK(error_of(layer, call) < 1e-2, "wrong with a span an expert");

    const FileSpan whole = stacked.down.spans[0];
    const uint64_t most = ~uint64_t{0};
    const struct {
      std::vector<FileSpan> spans;
      const char* sentence;
    } wrong[] = {
        {{{whole.path, whole.offset + 1, whole.bytes}}, "the file is truncated"},
        {{{whole.path, most, whole.bytes}}, "the file is truncated"},
        {{{whole.path, most - whole.bytes + 1, whole.bytes}}, "the file is truncated"},
        {{{whole.path, uint64_t{1} << 63, whole.bytes}}, "the file is truncated"},
        {{{whole.path, 0, whole.bytes - 4}}, "hold"},
        {{{whole.path, 0, whole.bytes + 4}}, "hold more"},
        {{{whole.path, 0, most}, {whole.path, 0, whole.bytes + 1}}, "hold more"},  // together whole.bytes, mod 2^64
        {{{whole.path, 0, whole.bytes}, {whole.path, 0, most}, {whole.path, 0, 1}}, "hold more"},
        {{}, "hold 0 bytes"},
        {{{"/tmp", 0, whole.bytes}}, "not a regular file"},
        {{{"", 0, whole.bytes}}, "cannot open"},
    };
    for (const auto& [spans, sentence] : wrong) {
      MoEExecutor executor({"reference", places({-1}), 4});
      MoELayerSpec spec = stacked;
      spec.down.spans = spans;
      CHECK_ERROR(executor.add_layer(spec), "layer 0, tensor down", sentence);
    }
  }
}

TEST(misuse) {
  Layer layer(GgmlType::F32, 2, 8, 8);
  MoEExecutor executor({"reference", places({-1}), 4});
  executor.add_layer(layer.spec);
  Call call(layer, 2, 2);
  CHECK_ERROR(executor.submit(0, call.params()), "layer 0 is not loaded");
  CHECK_ERROR(executor.submit(1, call.params()), "layer is 1, expected 0 to 0");
  CHECK_ERROR(executor.wait(), "without a submit()");
  CHECK_ERROR(MoEExecutor({"reference", places({-1}), 0}), "max_num_tokens is 0");
}

}  // namespace
}  // namespace kt
