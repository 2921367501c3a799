// Memory for weights and workspaces: pages straight from the kernel, huge where they can be.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kt {

// Owns one mapping. Pages are zero and exist only once touched, on the node of the thread that touches them first.
// Not synchronised; moving is cheap.
class NodeMemory {
 public:
  NodeMemory() = default;
  // Starts on a 2 MiB boundary. `purpose` is for the text of the kt::Error thrown when the kernel refuses.
  NodeMemory(size_t bytes, std::string_view purpose);
  ~NodeMemory();
  NodeMemory(NodeMemory&& other) noexcept;
  NodeMemory& operator=(NodeMemory&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;    // as asked for
  size_t mapped_ = 0;  // in whole pages
};

}  // namespace kt
