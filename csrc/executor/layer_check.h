// What must hold of a layer's tensors before anything is read.
#pragma once

#include "kernels/kernel_table.h"
#include "moe_params.h"

namespace kt {

// Throws kt::Error naming the layer and the tensor. Reads file lengths only.
void check_layer(const MoELayerSpec& spec, const KernelTable& table, int layer_index);

}  // namespace kt
