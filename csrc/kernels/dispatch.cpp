#include "kernels/dispatch.h"

#include "check.h"
#include "kernels/cpu_features.h"

namespace kt {

namespace amx {
extern const KernelTable kTable;
}
namespace avx512_vnni {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
namespace avx2_vnni {
extern const KernelTable kTable;
}
namespace avx2 {
extern const KernelTable kTable;
}
namespace reference {
extern const KernelTable kTable;
}

const std::vector<const KernelTable*>& kernel_tables() {
  static const std::vector<const KernelTable*> tables = {&amx::kTable,       &avx512_vnni::kTable, &avx512::kTable,
                                                         &avx2_vnni::kTable, &avx2::kTable,        &reference::kTable};
  return tables;
}

namespace {

std::string known_isas() {
  std::string names = "auto";
  const char* last = "auto";
  for (const KernelTable* table : kernel_tables())
    if (std::string_view(table->isa) != last) names += std::string(", ") + (last = table->isa);
  return names;
}

// "avx512 with VNNI"
std::string full_name(const KernelTable& table) {
  return *table.variant == 0 ? table.isa : std::string(table.isa) + " with " + table.variant;
}

}  // namespace

KernelChoice choose_kernel_table(std::string_view requested, uint32_t features) {
  std::string refused;                 // "; avx2 lacks fma"
  const KernelTable* least = nullptr;  // the last, least demanding table of the requested isa
  for (const KernelTable* table : kernel_tables()) {
    if (requested != "auto" && requested != table->isa) continue;
    least = table;
    const std::string missing = cpu_feature_names(table->required_features & ~features);
    if (missing.empty()) {
      const char* why = requested == "auto" ? ": the best this CPU can run" : ": requested";
      return {table, full_name(*table) + why + refused};
    }
    refused += "; " + full_name(*table) + " lacks " + missing;
  }
  KT_CHECK(least != nullptr, "kernels '", requested, "' do not exist, expected one of ", known_isas());
  fail("kernels '", requested, "' need ", cpu_feature_names(least->required_features),
       ", but this CPU or its operating system lacks ", cpu_feature_names(least->required_features & ~features),
       "; choose 'auto'");
}

}  // namespace kt
