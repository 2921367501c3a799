#include "numa/lost_cpu.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>

namespace kt {
namespace {

// Delays of a longer time than this are everyone's small ones added up, and say nothing about the phase that is late.
constexpr int64_t kLongestLook = 100'000'000;

}  // namespace

int64_t run_delay_ns() {
  // Opened each time: it is read seldom, and is then surely the calling thread's.
  const int file = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
  if (file < 0) return -1;
  char text[128];
  const ssize_t length = read(file, text, sizeof(text) - 1);
  close(file);
  if (length <= 0) return -1;
  text[length] = '\0';
  int64_t running, delay;
  return std::sscanf(text, "%" SCNd64 " %" SCNd64, &running, &delay) == 2 ? delay : -1;
}

void LostCpu::resume(int64_t now_ns) {
  looked_ns_ = now_ns;
  delay_ns_ = run_delay_ns();
}

bool LostCpu::arrived_late(int64_t now_ns, int64_t late_by_ns, int num_active, const ParkPolicy& policy) {
  const int64_t delay = run_delay_ns();
  const int64_t lost = delay - delay_ns_;
  const int64_t passed = now_ns - looked_ns_;
  delay_ns_ = delay;
  looked_ns_ = now_ns;
  if (delay < 0) return false;
  // What one of num_active workers does in that time is what the others would need more without it.
  owed_ns_ = std::max<int64_t>(0, owed_ns_ - passed / num_active);
  if (passed > kLongestLook) return false;
  // Late for want of the CPU, not because its last work item was long.
  owed_ns_ += std::min(late_by_ns, lost);
  const bool park = owed_ns_ >= policy.park_at_ns;
  owed_ns_ = std::min(owed_ns_, 2 * policy.park_at_ns);  // soon forgiven
  return park;
}

}  // namespace kt
