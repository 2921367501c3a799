// Scratch memory of a call: made once for the largest call, shared by all layers.
#pragma once

#include <cstddef>
#include <vector>

#include "numa/node_memory.h"

namespace kt {

// What one layer needs for the largest piece of a call, in bytes.
struct WorkspaceSize {
  size_t input[2] = {0, 0};       // token rows as gate and up want them; up's is 0 when it shares gate's
  size_t intermediate = 0;        // slot rows as down wants them
  size_t input_tiles = 0;         // slots of the tile path
  size_t intermediate_tiles = 0;  // the same on the tile path
  size_t slot_rows[2] = {0, 0};   // slot rows in float32 of a range of hidden rows: one pass's, and the next one's
  size_t worker = 0;              // of each worker thread alone

  size_t total(int num_workers) const;
};

class Workspace {
 public:
  explicit Workspace(int num_workers) : worker_(num_workers) {}

  // Grows what is too small; pages exist only once touched. Not while a call is running. Throws kt::Error.
  void reserve(const WorkspaceSize& size);

  uint8_t* input(int i) const { return input_[i].data(); }
  uint8_t* input_tiles() const { return input_tiles_.data(); }
  uint8_t* intermediate() const { return intermediate_.data(); }
  uint8_t* intermediate_tiles() const { return intermediate_tiles_.data(); }
  float* slot_rows(int pass) const { return reinterpret_cast<float*>(slot_rows_[pass % 2].data()); }
  uint8_t* worker(int i) const { return worker_[i].data(); }

 private:
  NodeMemory input_[2];
  NodeMemory input_tiles_;
  NodeMemory intermediate_;
  NodeMemory intermediate_tiles_;
  NodeMemory slot_rows_[2];
  std::vector<NodeMemory> worker_;  // a mapping each, so that each lies on its worker's node
};

}  // namespace kt
