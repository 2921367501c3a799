#include "gguf/dense_reader.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "check.h"
#include "gguf/dequantize.h"
#include "gguf/float_bits.h"

namespace kt {
namespace {

// Decoded and rounded at a time: float32 that stays in L1. A multiple of every block size.
constexpr int64_t kPiece = 2048;

// Loops that the compiler makes vectors of. in, out: [n], apart; n at most kPiece.
void round_to_f16(const float* __restrict in, int64_t n, uint16_t* __restrict out) {
  uint32_t wide[kPiece];  // in one loop the compiler would narrow, at some cost, many values on the way to the result
  for (int64_t i = 0; i < n; ++i) wide[i] = f32_to_wide_f16(in[i]);
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint16_t>(wide[i]);
}

void round_to_bf16(const float* __restrict in, int64_t n, uint16_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = f32_to_bf16(in[i]);
}

// blocks: those of num_weights weights; destination: [num_weights] of float_type.
void convert(GgmlType type, const uint8_t* blocks, int64_t num_weights, FloatType float_type, void* destination) {
  if (float_type == FloatType::F32) return dequantize(type, blocks, num_weights, static_cast<float*>(destination));
  auto* out = static_cast<uint16_t*>(destination);
  const size_t piece_bytes = ggml_row_bytes(type, kPiece);
  alignas(64) float values[kPiece];
  for (int64_t done = 0; done < num_weights; done += kPiece, blocks += piece_bytes) {
    const int64_t n = std::min(kPiece, num_weights - done);
    dequantize(type, blocks, n, values);
    if (float_type == FloatType::F16)
      round_to_f16(values, n, out + done);
    else
      round_to_bf16(values, n, out + done);
  }
}

// Whether the file's bytes are already the floats that are wanted.
bool same(GgmlType type, FloatType float_type) {
  switch (float_type) {
    case FloatType::F32:
      return type == GgmlType::F32;
    case FloatType::F16:
      return type == GgmlType::F16;
    case FloatType::BF16:
      return type == GgmlType::BF16;
  }
  return false;
}

class Reader {
 public:
  Reader(const DenseSource& source, const std::string& name, void* destination, FloatType float_type)
      : source_(source),
        name_(name),
        destination_(static_cast<uint8_t*>(destination)),
        float_type_(float_type),
        descriptor_(open(source.path.c_str(), O_RDONLY | O_CLOEXEC)) {
    KT_CHECK(descriptor_ >= 0, "'", source.path, "' cannot be opened any more (", std::strerror(errno),
             "): restore it and start again");
    posix_fadvise(descriptor_, 0, 0, POSIX_FADV_SEQUENTIAL);  // a hint: read further ahead
  }
  ~Reader() { close(descriptor_); }
  Reader(const Reader&) = delete;

  // Reads chunks until none is left or one failed. Called by every thread.
  void work() noexcept {
    try {
      std::unique_ptr<uint8_t[]> buffer;
      if (!same(source_.type, float_type_))
        buffer = std::make_unique_for_overwrite<uint8_t[]>(
            ggml_row_bytes(source_.type, std::min(kDenseChunk, source_.num_weights)));
      for (int64_t begin; (begin = next_.fetch_add(kDenseChunk, std::memory_order_relaxed)) < source_.num_weights;)
        read_chunk(begin, std::min(kDenseChunk, source_.num_weights - begin), buffer.get());
    } catch (...) {
      const std::lock_guard lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
      next_.store(source_.num_weights, std::memory_order_relaxed);
    }
  }

  // After all threads are done.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void read_chunk(int64_t begin, int64_t num_weights, uint8_t* buffer) const {
    const uint64_t from = source_.offset + ggml_row_bytes(source_.type, begin);
    const size_t bytes = ggml_row_bytes(source_.type, num_weights);
    uint8_t* out = destination_ + static_cast<size_t>(begin) * float_bytes(float_type_);
    if (buffer == nullptr) return read(from, bytes, out);
    read(from, bytes, buffer);
    convert(source_.type, buffer, num_weights, float_type_, out);
  }

  void read(uint64_t from, size_t bytes, uint8_t* out) const {
    while (bytes > 0) {
      const ssize_t got = pread(descriptor_, out, bytes, static_cast<off_t>(from));
      if (got < 0 && errno == EINTR) continue;
      KT_CHECK(got >= 0, "reading ", bytes, " bytes at ", from, " of '", source_.path, "' failed (",
               std::strerror(errno), "): check the disk and start again");
      KT_CHECK(got > 0, "'", source_.path, "' ended inside tensor ", name_,
               " though it was long enough when it was opened: something is writing to it; wait for that and start "
               "again");
      out += got;
      from += static_cast<uint64_t>(got);
      bytes -= static_cast<size_t>(got);
    }
  }

  const DenseSource& source_;
  const std::string& name_;
  uint8_t* destination_;
  FloatType float_type_;
  int descriptor_;
  std::atomic<int64_t> next_{0};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

}  // namespace

void read_dense(const DenseSource& source, const std::string& name, void* destination, FloatType float_type,
                int num_threads) {
  KT_CHECK(num_threads >= 1, "num_threads is ", num_threads, ", expected at least 1");
  ggml_row_bytes(source.type, source.num_weights);  // throws when they are not whole blocks
  Reader reader(source, name, destination, float_type);
  const int64_t num_chunks = (source.num_weights + kDenseChunk - 1) / kDenseChunk;
  {
    std::vector<std::jthread> others;  // joined at the end of the block
    for (int64_t i = 1; i < std::min<int64_t>(num_threads, num_chunks); ++i)
      others.emplace_back([&reader] { reader.work(); });
    reader.work();
  }
  reader.rethrow();
}

}  // namespace kt
