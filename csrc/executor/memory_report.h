// What became of the memory for expert weights, in words.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "numa/node_memory.h"

namespace kt {

struct ReportedMemory {
  const NodeMemory* memory;
  int numa_node;  // it is for, or -1
};

// Bytes of the given memory that the kernel keeps in huge pages, as smaps says. Where a mapping holds other memory too,
// its huge pages count as far as ours could hold them. Reads the page tables: some milliseconds a GB of small pages.
size_t huge_page_bytes(const std::vector<ReportedMemory>& parts, const std::string& smaps = "/proc/self/smaps");

// One line for the log: bytes, how much of them in huge pages, on which nodes, and what bindings were refused.
std::string describe_memory(const std::vector<ReportedMemory>& parts);

}  // namespace kt
