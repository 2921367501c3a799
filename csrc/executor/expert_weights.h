// The weights of one projection of a layer's experts, in memory as the kernels read them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "executor/expert_loader.h"
#include "executor/row_range.h"
#include "kernels/kernel_table.h"
#include "moe_params.h"
#include "numa/node_memory.h"
#include "numa/thread_pool.h"

namespace kt {

// The rows of every expert are cut into slices, one for each memory node, and a slice holds its part of every expert,
// panel after panel: each node's workers have work near them whichever experts a token needs.
class ExpertWeights {
 public:
  // The table has kernels for the type (check_layer()). Slices are cut at multiples of `granule`, which is one of
  // panel rows, in proportion to `shares`. Allocates no memory for weights.
  ExpertWeights(const ExpertTensor& spec, const KernelTable& table, int granule, const std::vector<int>& shares);

  const TypeKernels& kernels() const { return *kernels_; }
  int num_experts() const { return spec_.num_experts; }
  int num_rows() const { return spec_.num_rows; }
  int k() const { return spec_.num_cols; }
  int block_size() const { return block_size_; }
  size_t row_bytes() const { return row_bytes_; }
  size_t panel_bytes() const { return panel_rows() * row_bytes_; }
  const std::vector<RowRange>& slices() const { return slices_; }
  size_t slice_bytes(int slice) const { return num_experts() * panels_of(slice) * panel_bytes(); }

  // The panel that begins with `row`, a row of the slice.
  const uint8_t* panel(int slice, int expert, int row) const {
    const size_t index = expert * panels_of(slice) + (row - slices_[slice].begin) / panel_rows();
    return memory_[slice].data() + index * panel_bytes();
  }

  // Memory for each slice, on the node of its group of workers, unless it is there; and what is to be read into it.
  // Throws kt::Error.
  void prepare_loading(const ThreadPool& pool, ExpertLoader& loader);

  const std::vector<NodeMemory>& memory() const { return memory_; }  // empty before prepare_loading()

 private:
  size_t panel_rows() const { return static_cast<size_t>(kernels_->panel_rows); }
  size_t panels_of(int slice) const { return (slices_[slice].size() + panel_rows() - 1) / panel_rows(); }

  ExpertTensor spec_;
  const TypeKernels* kernels_;
  int block_size_;
  size_t row_bytes_;
  std::vector<RowRange> slices_;
  std::vector<NodeMemory> memory_;
};

}  // namespace kt
