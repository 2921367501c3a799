// Places and jobs for the tests of the thread pool.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <vector>

#include "numa/thread_pool.h"

namespace kt::test {

// Some CPUs this process may use, repeated when there are fewer.
inline std::vector<WorkerPlace> some_cpus(int count) {
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof(allowed), &allowed);
  std::vector<WorkerPlace> places;
  for (int cpu = 0; static_cast<int>(places.size()) < count; cpu = (cpu + 1) % CPU_SETSIZE)
    if (CPU_ISSET(cpu, &allowed)) places.push_back({cpu, -1});
  return places;
}

// Takes items from a counter, as jobs should, and notes who did.
struct Sharing final : ThreadPool::Job {
  Sharing(const ThreadPool& of, int phases) : pool(of), ran(of.num_workers()), num_phases(phases) {}
  void run(int, int worker) override {
    ran[worker] = stamp;
    while (next_item.fetch_add(1, std::memory_order_relaxed) < kItems) {
      ++items_done;
      if (item) item();
    }
  }
  int next_phase(int phase) override {
    std::vector<int> on_group(pool.num_nodes());
    int num_ran = 0;
    for (int worker = 0; worker < pool.num_workers(); ++worker) {
      if (ran[worker] != stamp) continue;
      ++num_ran;
      ++on_group[pool.node_of(worker)];
    }
    fewest = std::min(fewest, num_ran);
    idle_groups += std::count(on_group.begin(), on_group.end(), 0);
    items_expected += kItems;
    next_item = 0;
    ++stamp;
    return phase + 1 < num_phases ? phase + 1 : ThreadPool::kDone;
  }
  static constexpr int kItems = 20;
  const ThreadPool& pool;
  std::function<void()> item;
  std::vector<int> ran;  // not atomic: the pool must order them
  int stamp = 1;
  int num_phases;
  int fewest = 1 << 20;  // workers in a phase
  int64_t idle_groups = 0;
  int64_t items_expected = 0;
  std::atomic<int64_t> items_done{0};
  std::atomic<int> next_item{0};
};

}  // namespace kt::test
