// The choice of a kernel table, with CPU features made up.
#include <set>

#include "check.h"
#include "kernels/cpu_features.h"
#include "kernels/dispatch.h"
#include "test_harness.h"

namespace kt {
namespace {

constexpr uint32_t kAvx2Bits = kAvx2 | kFma | kF16c;
constexpr uint32_t kEverything = ~0u;

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST(tables_are_complete_and_end_with_the_reference) {
  const auto& tables = kernel_tables();
  CHECK(!tables.empty() && std::string(tables.back()->isa) == "reference", "last table");
  CHECK(tables.back()->required_features == 0, "the reference must run anywhere");
  int count = 0;
  const GgmlTypeInfo* types = ggml_types(&count);
  std::set<std::string> names;
  for (const KernelTable* table : tables) {
    CHECK(names.insert(std::string(table->isa) + table->variant).second, "two tables named " << table->isa);
    CHECK(table->silu_mul && table->add_scaled && table->load_floats && table->store_floats, table->isa);
    for (int i = 0; i < count; ++i) {
      const TypeKernels* kernels = find_type_kernels(*table, types[i].type);
      CHECK(kernels != nullptr, table->isa << " lacks " << types[i].name);
      if (!kernels) continue;
      CHECK(kernels->quantize_activations && kernels->gemm, types[i].name);
      CHECK(types[i].block_size == 1 || types[i].block_size % kernels->activation_block == 0, types[i].name);
      // Types of one format share a quantised row.
      for (int j = 0; j < table->num_types; ++j) {
        const TypeKernels& other = table->types[j];
        if (other.activation_format != kernels->activation_format) continue;
        CHECK(other.quantize_activations == kernels->quantize_activations &&
                  other.activation_block_bytes == kernels->activation_block_bytes,
              table->isa << " " << types[i].name);
      }
    }
  }
}

TEST(auto_takes_the_best_that_runs) {
  KernelChoice choice = choose_kernel_table("auto", kAvx2Bits);
  CHECK(std::string(choice.table->isa) == "avx2" && !*choice.table->variant, choice.reason);
  CHECK(contains(choice.reason, "avx2 with AVX-VNNI lacks avx_vnni"), choice.reason);

  choice = choose_kernel_table("auto", kAvx2Bits | kAvxVnni);
  CHECK(std::string(choice.table->variant) == "AVX-VNNI", choice.reason);
  choice = choose_kernel_table("auto", kAvx2Bits | kAvx512);
  CHECK(std::string(choice.table->isa) == "avx512" && !*choice.table->variant, choice.reason);
  choice = choose_kernel_table("auto", kAvx2Bits | kAvx512 | kAvx512Vnni);
  CHECK(std::string(choice.table->isa) == "avx512" && *choice.table->variant, choice.reason);
  choice = choose_kernel_table("auto", kEverything);
  CHECK(choice.table == kernel_tables().front(), choice.reason);
  CHECK(!contains(choice.reason, "lacks"), choice.reason);

  choice = choose_kernel_table("auto", kAvx2 | kF16c);
  CHECK(std::string(choice.table->isa) == "reference", choice.reason);
  CHECK(contains(choice.reason, "avx2 lacks fma"), choice.reason);

  choice = choose_kernel_table("auto", 0);
  CHECK(std::string(choice.table->isa) == "reference", choice.reason);
  CHECK(contains(choice.reason, "avx2 lacks avx2 fma f16c"), choice.reason);
  CHECK(!contains(choice.reason, "\n"), choice.reason);
}

TEST(a_name_is_obeyed_or_refused) {
  for (const KernelTable* table : kernel_tables()) {
    const KernelChoice choice = choose_kernel_table(table->isa, table->required_features);
    CHECK(choice.table == table, choice.reason);
    CHECK(contains(choice.reason, "requested"), choice.reason);
  }
  CHECK(choose_kernel_table("reference", 0).table == kernel_tables().back(), "reference");
  CHECK_ERROR(choose_kernel_table("avx2", kAvx2 | kFma), "avx2", "lacks f16c", "auto");
  CHECK_ERROR(choose_kernel_table("avx512", kAvx2Bits), "avx512", "lacks avx512", "auto");
  CHECK_ERROR(choose_kernel_table("sse9", kEverything), "sse9", "auto", "avx2", "reference");
  CHECK_ERROR(choose_kernel_table("", kEverything), "expected one of");
}

TEST(this_cpu_can_be_asked) {
  const uint32_t features = detect_cpu_features();
  CHECK(cpu_feature_names(features).size() >= 1 || features == 0, features);
  CHECK(choose_kernel_table("auto", features).table != nullptr, "auto must always find one");
  CHECK(cpu_feature_names(kAvx2 | kFma) == "avx2 fma", cpu_feature_names(kAvx2 | kFma));
  CHECK(cpu_feature_names(0).empty(), cpu_feature_names(0));
}

}  // namespace
}  // namespace kt
