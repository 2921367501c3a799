#include "executor/workspace.h"

namespace kt {
namespace {

void grow(NodeMemory& memory, size_t bytes) {
  if (memory.size() < bytes) memory = NodeMemory(bytes, "executor workspace");
}

}  // namespace

size_t WorkspaceSize::total(int num_workers) const {
  return input[0] + input[1] + input_tiles + intermediate + intermediate_tiles + slot_rows[0] + slot_rows[1] +
         worker * static_cast<size_t>(num_workers);
}

void Workspace::reserve(const WorkspaceSize& size) {
  for (int i = 0; i < 2; ++i) {
    grow(input_[i], size.input[i]);
    grow(slot_rows_[i], size.slot_rows[i]);
  }
  grow(input_tiles_, size.input_tiles);
  grow(intermediate_, size.intermediate);
  grow(intermediate_tiles_, size.intermediate_tiles);
  for (NodeMemory& memory : worker_) grow(memory, size.worker);
}

}  // namespace kt
