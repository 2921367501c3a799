// What the machine can do at best: the roof that measured times are compared with.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace kt {

// All functions run one thread pinned to each entry of cpus, all at once, and block for about `seconds` of measuring
// (and the time to fill the memory). The result is the median of several bursts, each the sum of what the threads did,
// since virtual machines change their clock from one moment to the next. They throw kt::Error.

// GB/s (1e9 bytes) of plain vector loads from `bytes` of memory, of which each thread reads its own 1 MiB chunks, every
// n-th one. Make it several times larger than the last-level cache, or the cache is what is measured.
double measure_dram_read(const std::vector<int>& cpus, size_t bytes, double seconds);

// What this CPU can run of: amx_int8, amx_bf16, avx512_vnni_int8, avx512_int8, avx_vnni_int8, avx2_int8, avx512_fp32,
// avx2_fp32. Fastest first among those that end alike.
std::vector<std::string> peak_kinds();

// Operations per second of the instructions of that kind, operands in registers; a multiplication and an addition are
// two operations.
double measure_peak(const std::string& kind, const std::vector<int>& cpus, double seconds);

}  // namespace kt
