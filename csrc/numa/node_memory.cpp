#include "numa/node_memory.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <utility>
#include <vector>

#include "check.h"

namespace kt {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;  // the huge page of x86-64

// linux/mempolicy.h; libnuma is not a dependency. Of the policies that name a node, MPOL_BIND kills the process when
// the node is full, and MPOL_PREFERRED_MANY is new in Linux 5.15 and does not compact memory for huge pages.
constexpr int kMpolPreferred = 1;

int bind_to(void* address, size_t bytes, int numa_node) {
  constexpr int kBits = 8 * sizeof(unsigned long);
  std::vector<unsigned long> mask(numa_node / kBits + 1, 0);
  mask[numa_node / kBits] = 1UL << (numa_node % kBits);
  // The kernel reads one bit fewer than it is told.
  return syscall(SYS_mbind, address, bytes, kMpolPreferred, mask.data(), mask.size() * kBits + 1, 0) == 0 ? 0 : errno;
}

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

}  // namespace

NodeMemory::NodeMemory(size_t bytes, std::string_view purpose, int numa_node) : size_(bytes) {
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
  if (numa_node >= 0) bind_error_ = bind_to(data_, mapped_, numa_node);
}

NodeMemory::~NodeMemory() {
  if (data_ != nullptr) munmap(data_, mapped_);
}

NodeMemory::NodeMemory(NodeMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      mapped_(std::exchange(other.mapped_, 0)),
      bind_error_(std::exchange(other.bind_error_, 0)) {}

NodeMemory& NodeMemory::operator=(NodeMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_, other.mapped_);
  std::swap(bind_error_, other.bind_error_);
  return *this;
}

std::string huge_page_report(const std::string& root) {
  const std::string setting = "/sys/kernel/mm/transparent_hugepage/enabled";
  const std::string allowed = first_line(root + setting);  // such as "always [madvise] never"
  const std::string reserved = first_line(root + "/proc/sys/vm/nr_hugepages");
  std::string text;
  if (allowed.find("[always]") != std::string::npos)
    text = "huge pages: yes (always)";
  else if (allowed.find("[madvise]") != std::string::npos)
    text = "huge pages: yes (madvise)";
  else if (allowed.find("[never]") != std::string::npos)
    text = "huge pages: no (never); weights are read faster from them, to allow them: echo madvise > " + setting;
  else
    text = "huge pages: no, this kernel has no " + setting;
  if (!reserved.empty() && reserved != "0")
    text += "; " + reserved + " pages are reserved by vm.nr_hugepages, which the weights cannot use: set it to 0";
  return text;
}

}  // namespace kt
