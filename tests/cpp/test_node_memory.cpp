// Where the pages of NodeMemory lie, on as many memory nodes as the machine has.
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "numa/node_memory.h"
#include "test_harness.h"

namespace kt {
namespace {

namespace fs = std::filesystem;

// linux/mempolicy.h
constexpr int kPolicyOfAddress = 1 << 1;  // MPOL_F_ADDR
constexpr int kMpolPreferred = 1;

std::vector<int> nodes_with_memory() {
  std::ifstream file("/sys/devices/system/node/has_memory");
  std::vector<int> nodes;
  for (std::string part; std::getline(file, part, ',');) {
    int first = 0, last = 0;
    const int got = std::sscanf(part.c_str(), "%d-%d", &first, &last);
    for (int node = first; got > 0 && node <= (got == 2 ? last : first); ++node) nodes.push_back(node);
  }
  return nodes;
}

// The node of each page, or -errno.
std::vector<int> nodes_of_pages(const NodeMemory& memory) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::vector<void*> pages;
  for (size_t i = 0; i < memory.size(); i += page) pages.push_back(memory.data() + i);
  std::vector<int> status(pages.size(), -1);
  if (syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, status.data(), 0) != 0)
    status.assign(pages.size(), -errno);
  return status;
}

TEST(touched_pages_lie_on_their_node) {
  const std::vector<int> nodes = nodes_with_memory();
  size_t num_bound = 0;
  for (int node : nodes) {
    NodeMemory memory(static_cast<size_t>(test::random_int(3, 9)) * 1'000'003, "a test", node);
    if (memory.bind_error() == EPERM || memory.bind_error() == ENOSYS) {
      std::cout << "node " << node << " not bound: " << std::strerror(memory.bind_error()) << "\n";
      continue;
    }
    CHECK(memory.bind_error() == 0, "node " << node << ": " << std::strerror(memory.bind_error()));
    ++num_bound;
    int mode = -1;
    unsigned long mask[32] = {};
    const long got = syscall(SYS_get_mempolicy, &mode, mask, 8 * sizeof(mask), memory.data(), kPolicyOfAddress);
    if (got == 0)
      CHECK(mode == kMpolPreferred && mask[node / 64] == 1UL << (node % 64), "mode " << mode << ", mask " << mask[0]);
    std::memset(memory.data(), 1, memory.size());
    size_t num_elsewhere = 0;
    int elsewhere = node;
    for (int status : nodes_of_pages(memory)) {
      if (status == node || status == -EPERM || status == -ENOSYS) continue;
      ++num_elsewhere;
      elsewhere = status;
    }
    CHECK(num_elsewhere == 0, num_elsewhere << " pages for node " << node << " lie elsewhere, as on " << elsewhere);
  }
  std::cout << num_bound << " of " << nodes.size() << " memory nodes bound\n";
}

// Moving takes the binding's outcome along, and what was not bound works all the same.
TEST(a_refused_binding_is_told_and_harmless) {
  const int absent = 1000;
  NodeMemory memory(5'000'001, "a test", absent);
  CHECK(memory.bind_error() != 0, "node " << absent << " was bound");
  const int error = memory.bind_error();
  std::memset(memory.data(), 1, memory.size());
  CHECK(memory.data()[memory.size() - 1] == 1, "not writable");
  CHECK(reinterpret_cast<uintptr_t>(memory.data()) % (2 << 20) == 0, "not aligned");
  NodeMemory moved(std::move(memory));
  CHECK(moved.bind_error() == error && memory.bind_error() == 0, "the error did not move");
  CHECK(NodeMemory(100, "a test").bind_error() == 0, "an error without a binding");
  CHECK(NodeMemory(0, "nothing", absent).bind_error() == 0, "nothing was bound");
  CHECK(NodeMemory(100, "a test", 1 << 15).bind_error() != 0, "beyond any node");
}

TEST(huge_pages) {
  const fs::path root = fs::temp_directory_path() / ("kt_huge_pages_" + std::to_string(getpid()));
  const auto report = [&](const char* enabled, const char* reserved) {
    fs::remove_all(root);
    for (const auto& [path, text] : {std::pair{"sys/kernel/mm/transparent_hugepage/enabled", enabled},
                                     std::pair{"proc/sys/vm/nr_hugepages", reserved}}) {
      fs::create_directories((root / path).parent_path());
      if (text != nullptr) std::ofstream(root / path) << text << "\n";
    }
    const std::string line = huge_page_report(root.string());
    fs::remove_all(root);
    return line;
  };
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(report("[always] madvise never", "0") == "huge pages: yes (always)", "always");
  CHECK(report("always [madvise] never", nullptr) == "huge pages: yes (madvise)", "madvise");
  const std::string never = report("always madvise [never]", "0");
  CHECK(has(never, "no (never)") && has(never, "echo madvise > /sys/"), never);
  const std::string none = report(nullptr, "512");
  CHECK(has(none, "no, this kernel has no") && has(none, "512 pages are reserved"), none);
  const std::string here = huge_page_report();
  CHECK(here.starts_with("huge pages: ") && here.find('\n') == std::string::npos, here);
}

}  // namespace
}  // namespace kt
