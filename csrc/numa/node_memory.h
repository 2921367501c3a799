// Memory for weights and workspaces: pages straight from the kernel, huge where they can be, on the node they are for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace kt {

// Owns one mapping. Pages are zero and exist only once touched. Not synchronised; moving is cheap.
class NodeMemory {
 public:
  NodeMemory() = default;
  // Starts on a 2 MiB boundary. `purpose` is for the text of the kt::Error thrown when the kernel refuses.
  // numa_node >= 0: whoever touches a page first, it comes from this node as long as the node has any free, then from
  // the nearest other one. -1, or a binding that the kernel refuses: from the node of the thread that touches it first.
  NodeMemory(size_t bytes, std::string_view purpose, int numa_node = -1);
  ~NodeMemory();
  NodeMemory(NodeMemory&& other) noexcept;
  NodeMemory& operator=(NodeMemory&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  // errno of the refused binding, 0 when bound or not asked for: EPERM in a container without CAP_SYS_NICE, ENOSYS in a
  // kernel without NUMA, EINVAL for a node that is absent or not allowed to this process.
  int bind_error() const { return bind_error_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;    // as asked for
  size_t mapped_ = 0;  // in whole pages
  int bind_error_ = 0;
};

// One line for the log: whether this kernel gives NodeMemory huge pages, and what it keeps back. root: for tests.
std::string huge_page_report(const std::string& root = "");

}  // namespace kt
