#include "executor/expert_weights.h"

namespace kt {

ExpertWeights::ExpertWeights(const ExpertTensor& spec, const KernelTable& table, int granule,
                             const std::vector<int>& shares)
    : spec_(spec),
      kernels_(find_type_kernels(table, spec.type)),
      block_size_(ggml_type_info(spec.type).block_size),
      row_bytes_(ggml_row_bytes(spec.type, spec.num_cols)),
      slices_(split_rows(spec.num_rows, granule, shares)) {}

void ExpertWeights::prepare_loading(const ThreadPool& pool, ExpertLoader& loader) {
  if (memory_.empty()) {
    std::vector<NodeMemory> memory;
    for (int slice = 0; slice < static_cast<int>(slices_.size()); ++slice)
      memory.emplace_back(slice_bytes(slice), "expert weights", pool.numa_node(slice));
    memory_ = std::move(memory);
  }
  for (size_t slice = 0; slice < slices_.size(); ++slice)
    loader.add(spec_, slices_[slice], kernels_->panel_rows, static_cast<int>(slice), memory_[slice].data());
}

}  // namespace kt
