// Persistent pinned worker threads that run one job at a time, phase by phase.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "numa/event_count.h"

namespace kt {

// Where a worker belongs: its logical CPU and the memory node of that, -1 when unknown or of no matter.
struct WorkerPlace {
  int cpu;
  int numa_node;
};

// start(), done() and wait() are for one thread at a time; they never allocate, and lock nothing.
// Between two phases all workers meet. Waiting threads spin for kSpinNanoseconds, then sleep: an idle pool uses no CPU.
class ThreadPool {
 public:
  static constexpr int kDone = -1;

  class Job {
   public:
    // Every worker, once a phase. An exception ends the job after this phase; wait() reports it.
    virtual void run(int phase, int worker) = 0;
    // One worker, while all others wait: the phase after `phase`, or kDone. Sees all that the phase wrote.
    virtual int next_phase(int phase) = 0;

   protected:
    ~Job() = default;
  };

  // One worker an entry of places, pinned to its CPU, with the default memory policy, the default floating point
  // environment, and all signals but its own faults blocked: nothing of the creating thread leaks in. Returns when all
  // are in place.
  // Throws kt::Error when places is empty or a thread cannot be created.
  explicit ThreadPool(const std::vector<WorkerPlace>& places);
  ~ThreadPool();  // waits for the running job

  int num_workers() const { return static_cast<int>(places_.size()); }

  // Workers of one memory node are a group; groups are numbered in order of first appearance in places.
  int num_nodes() const { return static_cast<int>(groups_.size()); }
  int node_of(int worker) const { return group_of_[worker]; }
  int numa_node(int group) const { return groups_[group].numa_node; }  // the system's number, or -1
  int workers_on(int group) const { return groups_[group].num_workers; }

  // One line: where the workers run, and why not where they should.
  const std::string& placement_report() const { return placement_report_; }

  // Wakes the workers and returns. The job must live until wait() returns. A job must not be running.
  void start(Job* job, int first_phase);
  bool done() const { return finished_.value() == started_; }
  // Returns when the job is done; throws kt::Error with the first exception of a worker. Without a job: at once.
  void wait();

 private:
  struct Group {
    int numa_node;
    int num_workers;
  };
  struct Placement {
    int pin_error = 0;     // errno, 0 when pinned
    int policy_error = 0;  // errno, 0 when reset
  };

  void main(int worker);
  void run_phase(int worker);
  void finish_phase();
  void record_error(const char* what);
  void stop();
  bool on_worker_cpu() const;
  std::string describe_placement() const;

  std::vector<WorkerPlace> places_;
  std::vector<Group> groups_;
  std::vector<int> group_of_;  // [num_workers]
  int64_t spin_ns_;
  std::vector<Placement> placements_;
  std::string placement_report_;

  // Written while no worker runs a phase, published by phase_starts_.
  Job* job_ = nullptr;
  int phase_ = kDone;
  bool stopping_ = false;

  EventCount phase_starts_;
  EventCount finished_;  // jobs so far
  uint32_t started_ = 0;
  alignas(64) std::atomic<int> arrived_{0};
  std::atomic<bool> failed_{false};
  std::string error_;  // of the worker that set failed_

  std::vector<std::thread> threads_;
};

}  // namespace kt
