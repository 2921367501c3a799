// Tensors from files against dequantize() and rounding one by one.
#include <algorithm>
#include <cstring>

#include "check.h"
#include "gguf/dense_reader.h"
#include "gguf/dequantize.h"
#include "gguf/float_bits.h"
#include "temp_file.h"
#include "test_harness.h"

namespace kt {
namespace {

using test::random_int;

constexpr FloatType kFloatTypes[] = {FloatType::F32, FloatType::F16, FloatType::BF16};
constexpr uint8_t kUntouched = 0xa5;

// Any bytes at all: infinite and NaN scales too.
struct Tensor {
  Tensor(GgmlType type, int64_t num_weights)
      : type(type),
        num_weights(num_weights),
        offset(static_cast<uint64_t>(random_int(0, 70))),
        contents(offset + ggml_row_bytes(type, num_weights) + 9),
        values(static_cast<size_t>(num_weights)) {
    for (uint8_t& byte : contents) byte = static_cast<uint8_t>(test::rng()());
    dequantize(type, contents.data() + offset, num_weights, values.data());
  }

  DenseSource source(const std::string& path) const { return {path, offset, type, num_weights}; }

  GgmlType type;
  int64_t num_weights;
  uint64_t offset;
  std::vector<uint8_t> contents;  // of a file: before, the blocks, after
  std::vector<float> values;
};

// What bits of float_type mean, NaN being one value.
uint32_t meaning(uint32_t bits, FloatType float_type) {
  const float value = float_type == FloatType::F32   ? bits_to_float(bits)
                      : float_type == FloatType::F16 ? f16_to_f32(static_cast<uint16_t>(bits))
                                                     : bf16_to_f32(static_cast<uint16_t>(bits));
  return value != value ? 0x7fc00000u : bits;
}

uint32_t rounded(float value, FloatType float_type) {
  return float_type == FloatType::F32   ? float_to_bits(value)
         : float_type == FloatType::F16 ? f32_to_f16(value)
                                        : f32_to_bf16(value);
}

void check_read(const Tensor& tensor, const std::string& path, FloatType float_type, int num_threads) {
  const size_t size = float_bytes(float_type), bytes = size * tensor.values.size();
  std::vector<uint8_t> got(bytes + 64, kUntouched);
  read_dense(tensor.source(path), "'t'", got.data(), float_type, num_threads);
  int64_t wrong = 0, first = -1;
  for (size_t i = 0; i < tensor.values.size(); ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, got.data() + i * size, size);
    if (meaning(bits, float_type) == meaning(rounded(tensor.values[i], float_type), float_type)) continue;
    if (wrong++ == 0) first = static_cast<int64_t>(i);
  }
  CHECK(wrong == 0, ggml_type_info(tensor.type).name << " to " << static_cast<int>(float_type) << ", "
                                                     << tensor.num_weights << " weights, " << num_threads
                                                     << " threads: " << wrong << " wrong, first " << first);
  const auto beyond = static_cast<std::ptrdiff_t>(bytes);
  CHECK(std::count(got.begin() + beyond, got.end(), kUntouched) == 64, "written beyond the end");
}

void check_sizes(int64_t most_weights, int num_threads) {
  int count = 0;
  const GgmlTypeInfo* types = ggml_types(&count);
  for (int i = 0; i < count; ++i) {
    const int most_blocks = static_cast<int>(most_weights / types[i].block_size);
    const Tensor tensor(types[i].type, int64_t{random_int(most_blocks / 2, most_blocks)} * types[i].block_size);
    const test::TempFile file(tensor.contents);
    for (FloatType float_type : kFloatTypes) check_read(tensor, file.path(), float_type, num_threads);
  }
}

TEST(small_tensors) {
  for (int repeat = 0; repeat < 5; ++repeat) check_sizes(random_int(1, 20) * 512, random_int(1, 8));
}

TEST(tensors_of_several_chunks) { check_sizes(3 * kDenseChunk, random_int(2, 8)); }

TEST(any_number_of_threads) {
  const Tensor tensor(GgmlType::Q6_K, 5 * kDenseChunk + 256);
  const test::TempFile file(tensor.contents);
  for (int num_threads = 1; num_threads <= 8; ++num_threads)
    check_read(tensor, file.path(), FloatType::BF16, num_threads);
}

TEST(nothing_to_read) {
  const test::TempFile file({});
  read_dense({file.path(), 0, GgmlType::Q4_K, 0}, "'t'", nullptr, FloatType::F16, 4);
}

TEST(floats_stay_as_they_are) {
  const Tensor tensor(GgmlType::BF16, 1000);
  const test::TempFile file(tensor.contents);
  std::vector<uint16_t> got(1000);
  read_dense(tensor.source(file.path()), "'t'", got.data(), FloatType::BF16, 1);
  CHECK(std::memcmp(got.data(), tensor.contents.data() + tensor.offset, 2000) == 0, "changed");
}

TEST(what_is_refused) {
  const Tensor tensor(GgmlType::Q8_0, 4 * kDenseChunk);
  const test::TempFile file(tensor.contents);
  const DenseSource source = tensor.source(file.path());
  std::vector<float> out(tensor.values.size());
  const auto read = [&](const DenseSource& from, int num_threads) {
    read_dense(from, "'blk.0'", out.data(), FloatType::F32, num_threads);
  };
  CHECK_ERROR(read(source, 0), "num_threads is 0", "at least 1");
  DenseSource cut = source;
  cut.num_weights -= 1;
  CHECK_ERROR(read(cut, 1), "Q8_0", "block size 32");
  CHECK_ERROR(read({"/tmp", 0, GgmlType::F32, 8}, 1), "'/tmp' failed (Is a directory)", "start again");

  const auto whole = static_cast<int64_t>(tensor.contents.size());
  const auto bytes = static_cast<int64_t>(ggml_row_bytes(tensor.type, tensor.num_weights));
  const auto begin = static_cast<int64_t>(tensor.offset);
  file.resize(begin + bytes);
  read(source, 3);
  for (int num_threads = 1; num_threads <= 8; ++num_threads) {
    file.resize(begin + std::uniform_int_distribution<int64_t>(0, bytes - 1)(test::rng()));
    CHECK_ERROR(read(source, num_threads), file.path().c_str(), "ended inside tensor 'blk.0'", "start again");
    file.resize(whole);
  }
  file.resize(0);
  CHECK_ERROR(read(source, 2), "ended inside tensor");
  const std::string gone = file.path() + ".gone";
  CHECK_ERROR(read({gone, 0, GgmlType::F32, 8}, 1), gone.c_str(), "cannot be opened any more (No such file");
}

}  // namespace
}  // namespace kt
