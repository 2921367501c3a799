#include "numa/node_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "check.h"

namespace kt {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;  // the huge page of x86-64

}  // namespace

NodeMemory::NodeMemory(size_t bytes, std::string_view purpose) : size_(bytes) {
  if (bytes == 0) return;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  // The length is not rounded to huge pages: the kernel then serves the tail with small ones and no byte is wasted.
  mapped_ = (bytes + page - 1) / page * page;
  const size_t reserved = mapped_ + kHugePage;
  void* base = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  KT_CHECK(base != MAP_FAILED, "the kernel gave no address space for ", bytes, " bytes of ", purpose, " (",
           std::strerror(errno), "); free memory or raise the limit (ulimit -v)");
  const uintptr_t start = reinterpret_cast<uintptr_t>(base);
  const uintptr_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned != start) munmap(base, aligned - start);
  const uintptr_t end = aligned + mapped_;
  if (start + reserved != end) munmap(reinterpret_cast<void*>(end), start + reserved - end);
  data_ = reinterpret_cast<uint8_t*>(aligned);
  madvise(data_, mapped_, MADV_HUGEPAGE);  // a kernel without huge pages refuses; small pages are then all there is
}

NodeMemory::~NodeMemory() {
  if (data_ != nullptr) munmap(data_, mapped_);
}

NodeMemory::NodeMemory(NodeMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      mapped_(std::exchange(other.mapped_, 0)) {}

NodeMemory& NodeMemory::operator=(NodeMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_, other.mapped_);
  return *this;
}

}  // namespace kt
