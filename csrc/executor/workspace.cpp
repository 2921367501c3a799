#include "executor/workspace.h"

namespace kt {
namespace {

void grow(NodeMemory& memory, size_t bytes) {
  if (memory.size() < bytes) memory = NodeMemory(bytes, "executor workspace");
}

}  // namespace

void Workspace::reserve(const WorkspaceSize& size) {
  grow(input_[0], size.input[0]);
  grow(input_[1], size.input[1]);
  grow(intermediate_, size.intermediate);
  grow(intermediate_quant_, size.intermediate_quant);
  for (NodeMemory& memory : worker_) grow(memory, size.worker);
}

}  // namespace kt
