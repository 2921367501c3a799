// Workers that lose their CPU: who is waited for, who is parked, and when they come back.
#include <algorithm>
#include <chrono>
#include <iostream>
#include <thread>

#include "pool_jobs.h"
#include "test_harness.h"

namespace kt {
namespace {

using test::Sharing;
using test::some_cpus;

// CPUs that are not there: all distinct, so that any number of workers may be parked; the scheduler places them.
std::vector<WorkerPlace> no_cpus(const std::vector<int>& nodes) {
  std::vector<WorkerPlace> places;
  for (int node : nodes) places.push_back({4000 + static_cast<int>(places.size()), node});
  return places;
}

// Who keeps others waiting at all is gone for one or two jobs: as many changes as there can be.
TEST(workers_come_and_go) {
  if (run_delay_ns() < 0) {
    std::cout << "not tested: this kernel does not tell run delays\n";
    return;
  }
  for (const auto& nodes : {std::vector<int>{0, 0}, {0, 1}, {0, 0, 0, 1}, {0, 1, 2, 3, 3}, {0, 0, 0, 0, 1, 1, 1, 1}}) {
    uint64_t parks = 0;
    {
      ThreadPool pool(no_cpus(nodes), {.late_ns = 0, .park_at_ns = 0, .park_ns = 20'000});
      Sharing job(pool, 3);
      job.item = [] {
        for (int i = 0; i < 50; ++i) __builtin_ia32_pause();  // time for others to begin
      };
      const int64_t limit = now_ns() + 10'000'000'000;
      const bool possible = nodes != std::vector<int>{0, 1};
      for (int call = 0; call < 1000 || (possible && pool.num_parks() < 10 && now_ns() < limit); ++call) {
        if (call % 100 == 99) std::this_thread::sleep_for(std::chrono::microseconds(test::random_int(0, 150)));
        pool.start(&job, 0);
        pool.wait();
      }
      parks = pool.num_parks();
      CHECK(job.items_done == job.items_expected, job.items_done << " items, expected " << job.items_expected);
      CHECK(job.idle_groups == 0, job.idle_groups << " times a group had no worker");
    }  // some are parked while the pool ends
    CHECK(parks == 0 || nodes != std::vector<int>({0, 1}), "the last worker of a group was parked");
    CHECK(parks > 0 || nodes == std::vector<int>({0, 1}), "none of " << nodes.size() << " workers was parked");
  }
}

// The first of a group to have nothing left ends the phase, whether the others have begun or not; each group has one.
TEST(who_is_late_to_begin_is_not_waited_for) {
  ThreadPool pool({{4000, 0}, {4001, 0}, {4002, 1}});
  Sharing sharing(pool, 3000);
  pool.start(&sharing, 0);
  pool.wait();
  CHECK(sharing.items_done == sharing.items_expected, sharing.items_done << " items");
  CHECK(sharing.idle_groups == 0, sharing.idle_groups << " times a group had no worker");
  CHECK(sharing.fewest < 3, "every worker was waited for, 3000 times");
}

// Keeps a CPU busy while it lives.
class Competitor {
 public:
  explicit Competitor(int cpu)
      : thread_([this, cpu] {
          cpu_set_t own;
          CPU_ZERO(&own);
          CPU_SET(cpu, &own);
          sched_setaffinity(0, sizeof(own), &own);
          while (!stop_.load(std::memory_order_relaxed)) {
          }
        }) {}
  ~Competitor() {
    stop_ = true;
    thread_.join();
  }

 private:
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

TEST(a_worker_that_loses_its_cpu_is_parked_and_comes_back) {
  const std::vector<WorkerPlace> places = some_cpus(2);
  if (places[0].cpu == places[1].cpu || run_delay_ns() < 0) {
    std::cout << "not tested: needs two CPUs and run delays\n";
    return;
  }
  const auto spin_20us = [] {
    const int64_t end = now_ns() + 20'000;
    while (now_ns() < end) {
    }
  };
  const auto limit = [start = now_ns()] { return now_ns() < start + 20'000'000'000; };
  ThreadPool pool(places, {.late_ns = 300'000, .park_at_ns = 1'000'000, .park_ns = 20'000'000});
  Sharing job(pool, 2);
  job.item = spin_20us;
  const auto call = [&] {
    pool.start(&job, 0);
    pool.wait();
  };
  {
    const Competitor competitor(places[0].cpu);
    while (pool.num_parks() == 0 && limit()) call();
  }
  CHECK(pool.num_parks() > 0, "nobody was parked");
  job.fewest = 0;
  while (job.fewest < 2 && limit()) {
    job.fewest = 2;
    call();
  }
  CHECK(job.fewest == 2, "the parked worker did not come back");
  CHECK(job.items_done == job.items_expected, job.items_done << " items, expected " << job.items_expected);
}

// Workers of one CPU take it from each other: nothing to blame them for.
TEST(workers_that_share_a_cpu_are_not_parked) {
  ThreadPool pool({some_cpus(1)[0], some_cpus(1)[0], some_cpus(1)[0]}, {.late_ns = 0, .park_at_ns = 0});
  Sharing job(pool, 3);
  for (int i = 0; i < 100; ++i) {
    pool.start(&job, 0);
    pool.wait();
  }
  CHECK(pool.num_parks() == 0, pool.num_parks() << " parks");
}

// What one of 16 workers goes through with the default policy: each `every` it is late by `late` and has lost `lost` of
// its CPU since the last time. Milliseconds; returns how often it was parked, and for how long at most, within 10 s.
struct Parks {
  int count = 0;
  int64_t longest_ns = 0, total_ns = 0;
};
Parks parks_in_10s(double every, double late, double lost, double excused = 0, double until = 10'000) {
  const auto ns = [](double ms) { return static_cast<int64_t>(ms * 1e6); };
  const ParkPolicy policy;
  LostCpu account;
  Parks parks;
  int64_t now = ns(1000), delay = ns(500);
  account.look(now, delay);
  for (const int64_t end = now + ns(until); now < end;) {
    now += ns(every);
    delay += ns(lost);
    if (account.wants_look(now - ns(late))) account.look(now - ns(late), delay - ns(std::min(late, lost)));
    if (!account.look_late(now, delay, ns(late), ns(excused), 16, policy)) continue;
    const int64_t park_ns = account.park(now, 16, policy);
    parks.longest_ns = std::max(parks.longest_ns, park_ns);
    parks.total_ns += park_ns;
    ++parks.count;
    account.resume(now += park_ns, delay);
  }
  return parks;
}

TEST(only_a_sustained_competitor_is_reason_to_park) {
  const Parks competitor = parks_in_10s(6, 3, 3);  // half of the CPU, in slices of 3 ms
  CHECK(competitor.total_ns > 9'000'000'000, competitor.total_ns << " ns of 10 s parked beside a competitor");
  CHECK(competitor.longest_ns == ParkPolicy().park_ns, "parked for " << competitor.longest_ns << " ns at most");
  // Gone after a moment: parked for no longer than the parking costs what was lost.
  const Parks moment = parks_in_10s(6, 3, 3, 0, 40);
  CHECK(moment.count == 1 && moment.longest_ns == 16 * ParkPolicy().park_at_ns, moment.count << " parks");
  struct {
    const char* what;
    Parks parks;
  } const innocent[] = {
      {"a slice lost now and then", parks_in_10s(60, 3, 3)},
      {"long losses, seldom", parks_in_10s(500, 200, 200)},
      {"the host takes the CPU, which is no run delay", parks_in_10s(10, 3, 0)},
      {"long work items", parks_in_10s(100, 50, 0.2)},
      {"the caller runs there", parks_in_10s(6, 3, 3, 2.9)},
  };
  for (const auto& [what, parks] : innocent) CHECK(parks.count == 0, parks.count << " parks: " << what);
}

}  // namespace
}  // namespace kt
