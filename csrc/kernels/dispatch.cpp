#include "kernels/dispatch.h"

#include "check.h"
#include "kernels/cpu_features.h"

namespace kt {

namespace avx2 {
extern const KernelTable kTable;
}
namespace reference {
extern const KernelTable kTable;
}

const std::vector<const KernelTable*>& kernel_tables() {
  static const std::vector<const KernelTable*> tables = {&avx2::kTable, &reference::kTable};
  return tables;
}

namespace {

std::string known_isas() {
  std::string names = "auto";
  for (const KernelTable* table : kernel_tables()) names += std::string(", ") + table->isa;
  return names;
}

}  // namespace

KernelChoice choose_kernel_table(std::string_view requested, uint32_t features) {
  std::string refused;  // "; avx2: lacks fma"
  for (const KernelTable* table : kernel_tables()) {
    const std::string missing = cpu_feature_names(table->required_features & ~features);
    if (requested == table->isa) {
      KT_CHECK(missing.empty(), "kernels '", requested, "' need ", cpu_feature_names(table->required_features),
               ", but this CPU or its operating system lacks ", missing, "; choose 'auto'");
      return {table, std::string(table->isa) + ": requested"};
    }
    if (requested != "auto") continue;
    if (missing.empty()) return {table, std::string(table->isa) + ": the best this CPU can run" + refused};
    refused += std::string("; ") + table->isa + ": lacks " + missing;
  }
  fail("kernels '", requested, "' do not exist, expected one of ", known_isas());
}

}  // namespace kt
