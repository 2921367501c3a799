#include "executor/memory_report.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>

namespace kt {
namespace {

std::string gigabytes(size_t bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.2f GB", static_cast<double>(bytes) / 1e9);
  return text;
}

}  // namespace

size_t huge_page_bytes(const std::vector<ReportedMemory>& parts, const std::string& smaps) {
  std::map<uintptr_t, uintptr_t> ours;  // begin -> end
  for (const ReportedMemory& part : parts)
    if (part.memory->size() > 0) {
      const uintptr_t begin = reinterpret_cast<uintptr_t>(part.memory->data());
      ours[begin] = begin + part.memory->size();
    }
  std::ifstream file(smaps);
  size_t total = 0, shared = 0;  // shared: bytes of ours in the mapping being read
  for (std::string line; std::getline(file, line);) {
    unsigned long begin, end, kib;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2) {
      shared = 0;
      auto next = ours.upper_bound(begin);
      if (next != ours.begin()) --next;
      for (; next != ours.end() && next->first < end; ++next) {
        const uintptr_t from = std::max<uintptr_t>(next->first, begin), to = std::min<uintptr_t>(next->second, end);
        if (from < to) shared += to - from;
      }
    } else if (std::sscanf(line.c_str(), "AnonHugePages: %lu kB", &kib) == 1) {
      total += std::min<size_t>(kib * 1024, shared);
    }
  }
  return total;
}

std::string describe_memory(const std::vector<ReportedMemory>& parts) {
  size_t total = 0;
  std::map<int, size_t> by_node;
  std::map<int, int> refused;  // node -> errno
  for (const ReportedMemory& part : parts) {
    total += part.memory->size();
    by_node[part.numa_node] += part.memory->size();
    if (part.memory->bind_error() != 0) refused[part.numa_node] = part.memory->bind_error();
  }
  std::ostringstream text;
  text << gigabytes(total) << " of experts in host memory";
  if (total > 0) text << ", " << 100 * huge_page_bytes(parts) / total << "% of it in huge pages";
  for (const auto& [node, bytes] : by_node)
    if (node >= 0) text << "; node " << node << ": " << gigabytes(bytes);
  for (const auto& [node, error] : refused)
    text << "; not bound to node " << node << " (" << std::strerror(error)
         << "): it lies where the threads that loaded it run";
  return text.str();
}

}  // namespace kt
