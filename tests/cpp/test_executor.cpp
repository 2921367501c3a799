#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "executor/layer_check.h"
#include "executor/moe_executor.h"
#include "gguf/dequantize.h"
#include "kernels/cpu_features.h"
#include "kernels/dispatch.h"
#include "temp_file.h"
#include "test_harness.h"

namespace kt {
namespace {

// A layer of random weights of one type in a file, and the weights it decodes to.
struct Layer {
  Layer(GgmlType type, int experts, int hidden, int intermediate)
      : num_experts(experts), hidden_size(hidden), intermediate_size(intermediate) {
    std::vector<uint8_t> contents;
    for (int i = 0; i < 3; ++i) {
      const int rows = i == 2 ? hidden : intermediate, cols = i == 2 ? intermediate : hidden;
      const size_t bytes = ggml_row_bytes(type, cols) * rows * experts;
      ExpertTensor& tensor = *tensors()[i];
      tensor = {type, experts, rows, cols, {{"", contents.size(), bytes}}};
      append_weights(contents, type, size_t(rows) * cols * experts);
      weights[i].resize(size_t(rows) * cols * experts);
      dequantize(type, contents.data() + contents.size() - bytes, weights[i].size(), weights[i].data());
    }
    file = std::make_unique<test::TempFile>(contents);
    for (ExpertTensor* tensor : tensors()) tensor->spans[0].path = file->path();
  }

  // F32, or Q8_0 with a scale of 1/64: enough for what the executor does with any type.
  static void append_weights(std::vector<uint8_t>& contents, GgmlType type, size_t count) {
    const GgmlTypeInfo& info = ggml_type_info(type);
    const size_t begin = contents.size();
    contents.resize(begin + count / info.block_size * info.block_bytes);
    for (size_t i = begin; i < contents.size(); i += info.block_bytes) {
      if (type == GgmlType::F32) {
        const float value = test::random_normal();
        std::memcpy(&contents[i], &value, sizeof(value));
      } else {
        for (size_t byte = 0; byte < info.block_bytes; ++byte) contents[i + byte] = uint8_t(test::rng()());
        contents[i] = 0x00, contents[i + 1] = 0x24;
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

// Relative L2 error of the output against float64.
double error_of(const Layer& layer, const Call& call) {
  const int h = layer.hidden_size, m = layer.intermediate_size;
  double error = 0, size = 0;
  for (int token = 0; token < call.num_tokens; ++token) {
    std::vector<double> sum(h);
    for (int k = 0; k < call.top_k; ++k) {
      const int64_t expert = call.ids[token * call.top_k + k];
      if (expert < 0) continue;
      std::vector<float> inner(m);
      for (int row = 0; row < m; ++row) {
        const float* x = &call.x[size_t(token) * h];
        const double gate = dot(&layer.weights[0][(expert * m + row) * h], x, h);
        inner[row] = float(gate / (1 + std::exp(-gate)) * dot(&layer.weights[1][(expert * m + row) * h], x, h));
      }
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

std::unique_ptr<MoEExecutor> make_executor(const std::vector<Layer*>& layers, int num_workers, int max_num_tokens,
                                           const char* isa = "reference") {
  auto executor = std::make_unique<MoEExecutor>(ExecutorOptions{isa, std::vector<int>(num_workers, 0), max_num_tokens});
  for (Layer* layer : layers) executor->add_layer(layer->spec);
  executor->start_loading();
  while (!executor->load_progress().finished) std::this_thread::yield();
  return executor;
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

TEST(threads_and_pieces_do_not_change_bits) {
  Layer layer(GgmlType::Q8_0, 4, 64, 64);
  for (const KernelTable* table : kernel_tables()) {
    if ((table->required_features & ~detect_cpu_features()) != 0) continue;
    Call call(layer, 90, 3);
    run(*make_executor({&layer}, 1, 90, table->isa), 0, call);
    const std::vector<float> expected = call.output;
    for (int num_workers : {2, 7}) {
      for (int max_num_tokens : {1, 13, 90}) {
        std::fill(call.output.begin(), call.output.end(), 7.0f);
        run(*make_executor({&layer}, num_workers, max_num_tokens, table->isa), 0, call);
        CHECK(std::memcmp(call.output.data(), expected.data(), expected.size() * sizeof(float)) == 0,
              table->isa << ", " << num_workers << " workers, pieces of " << max_num_tokens);
      }
    }
  }
}

TEST(storm) {
  Layer layer(GgmlType::F32, 2, 8, 8);
  for (int num_workers : {1, 3}) {
    const auto executor = make_executor({&layer}, num_workers, 4);
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

TEST(destroyed_in_flight) {
  Layer layer(GgmlType::F32, 4, 64, 64);
  for (int i = 0; i < 20; ++i) {
    Call call(layer, 30, 2);
    auto executor = make_executor({&layer}, 2, 30);
    executor->submit(0, call.params());
    executor.reset();
    CHECK(error_of(layer, call) < 1e-5, "the call was not finished");
    auto loading = std::make_unique<MoEExecutor>(ExecutorOptions{"reference", {0, 0}, 30});
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

TEST(misuse) {
  Layer layer(GgmlType::F32, 2, 8, 8);
  MoEExecutor executor({"reference", {0}, 4});
  executor.add_layer(layer.spec);
  Call call(layer, 2, 2);
  CHECK_ERROR(executor.submit(0, call.params()), "layer 0 is not loaded");
  CHECK_ERROR(executor.submit(1, call.params()), "layer is 1, expected 0 to 0");
  CHECK_ERROR(executor.wait(), "without a submit()");
  CHECK_ERROR(MoEExecutor({"reference", {0}, 0}), "max_num_tokens is 0");
}

}  // namespace
}  // namespace kt
