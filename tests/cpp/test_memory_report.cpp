#include <cstdio>
#include <cstring>

#include "executor/memory_report.h"
#include "temp_file.h"
#include "test_harness.h"

namespace kt {
namespace {

std::string mapping(uintptr_t begin, uintptr_t end, int huge_kib) {
  char text[200];
  std::snprintf(text, sizeof(text),
                "%lx-%lx rw-p 00000000 00:00 0 \nRss:   99999 kB\nAnonHugePages:  %d kB\nVmFlags: rd\n",
                static_cast<unsigned long>(begin), static_cast<unsigned long>(end), huge_kib);
  return text;
}

TEST(only_our_huge_pages_count) {
  const NodeMemory first(size_t{8} << 20, "a test"), second(size_t{4} << 20, "a test"), none;
  const uintptr_t a = reinterpret_cast<uintptr_t>(first.data()), b = reinterpret_cast<uintptr_t>(second.data());
  const std::string text = mapping(0x1000, 0x400000, 2048) + mapping(a, a + (8 << 20), 6144) +
                           mapping(b - (64 << 20), b + (4 << 20), 16384) +
                           mapping(b + (32 << 20), b + (40 << 20), 2048);
  const test::TempFile file({text.begin(), text.end()});
  const std::vector<ReportedMemory> parts = {{&first, 0}, {&second, 1}, {&none, 0}};
  // All of the second, but no more: its mapping begins long before it.
  const size_t bytes = huge_page_bytes(parts, file.path());
  CHECK(bytes == size_t{10} << 20, bytes << " bytes");
  CHECK(huge_page_bytes(parts, "/nowhere") == 0, "bytes without smaps");
}

TEST(this_process) {
  const NodeMemory memory(size_t{16} << 20, "a test"), other(size_t{1} << 20, "a test", 0);
  std::memset(memory.data(), 1, memory.size());
  const std::string text = describe_memory({{&memory, -1}, {&other, 0}});
  CHECK(text.rfind("0.02 GB of experts in host memory, ", 0) == 0, text);
  CHECK(text.find("% of it in huge pages; node 0: 0.00 GB") != std::string::npos, text);
  CHECK(text.find("node -1") == std::string::npos, text);
  CHECK(describe_memory({}) == "0.00 GB of experts in host memory", describe_memory({}));
}

}  // namespace
}  // namespace kt
