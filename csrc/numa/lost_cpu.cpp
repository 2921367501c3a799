#include "numa/lost_cpu.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

namespace kt {
namespace {

constexpr int64_t kLookEvery = 5'000'000;

// Open as long as its thread lives: opening it for each look takes seven times as long, between two phases.
struct OwnSchedstat {
  OwnSchedstat() : file(open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC)) {}
  ~OwnSchedstat() {
    if (file >= 0) close(file);
  }
  const int file;
};

}  // namespace

int64_t run_delay_ns() {
  thread_local const OwnSchedstat own;
  char text[128];
  const ssize_t length = own.file < 0 ? -1 : pread(own.file, text, sizeof(text) - 1, 0);
  if (length <= 0) return -1;
  text[length] = '\0';
  char *first_end, *second_end;  // "running delay timeslices"
  std::strtoll(text, &first_end, 10);
  const int64_t delay = std::strtoll(first_end, &second_end, 10);
  return first_end == text || second_end == first_end ? -1 : delay;
}

bool LostCpu::wants_look(int64_t now_ns) const { return now_ns - looked_ns_ >= kLookEvery; }

void LostCpu::look(int64_t now_ns, int64_t delay_ns) {
  looked_ns_ = now_ns;
  delay_ns_ = delay_ns;
}

bool LostCpu::look_late(int64_t now_ns, int64_t delay_ns, int64_t late_by_ns, int64_t excused_ns, int num_active,
                        const ParkPolicy& policy) {
  const int64_t lost = looked_ns_ == 0 || delay_ns < 0 ? 0 : delay_ns - delay_ns_;
  look(now_ns, delay_ns);
  // What one of num_active workers does in that time is what the others would need more without it.
  owed_ns_ = std::max<int64_t>(0, owed_ns_ - (now_ns - forgiven_ns_) / num_active);
  forgiven_ns_ = now_ns;
  // Late for want of the CPU, not because its last work item was long.
  owed_ns_ += std::clamp<int64_t>(std::min(late_by_ns, lost) - excused_ns, 0, policy.count_at_most_ns);
  return owed_ns_ >= policy.park_at_ns;
}

int64_t LostCpu::park(int64_t now_ns, int num_active, const ParkPolicy& policy) {
  const bool again = parked_for_ns_ != 0 && now_ns - resumed_ns_ < parked_for_ns_;
  parked_for_ns_ = std::min(again ? 2 * parked_for_ns_ : policy.park_at_ns * num_active, policy.park_ns);
  owed_ns_ = policy.park_at_ns / 2;  // believed sooner the next time
  return parked_for_ns_;
}

void LostCpu::resume(int64_t now_ns, int64_t delay_ns) {
  look(now_ns, delay_ns);
  forgiven_ns_ = resumed_ns_ = now_ns;
}

}  // namespace kt
