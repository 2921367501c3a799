// The ordered list of kernel tables and the choice among them.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "kernels/kernel_table.h"

namespace kt {

// Every compiled table, best first; the scalar reference is last.
const std::vector<const KernelTable*>& kernel_tables();

struct KernelChoice {
  const KernelTable* table;
  std::string reason;  // one line for the log: what was chosen, why, and why each better table was not
};

// requested: "auto" or the isa of a table. `features` are CpuFeature bits (detect_cpu_features() outside tests).
// Takes the first table, of that isa unless "auto", whose features are all present. Throws kt::Error for an unknown
// name (listing those known) and for an isa of which this CPU can run no table (naming what the least of them lacks).
KernelChoice choose_kernel_table(std::string_view requested, uint32_t features);

}  // namespace kt
