// Persistent pinned worker threads that run one job at a time, phase by phase.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "numa/event_count.h"
#include "numa/lost_cpu.h"

namespace kt {

// Where a worker belongs: its logical CPU and the memory node of that, -1 when unknown or of no matter.
struct WorkerPlace {
  int cpu;
  int numa_node;
};

// start(), done() and wait() are for one thread at a time; they never allocate, and lock nothing.
// Between two phases all workers meet. Waiting threads spin for kSpinNanoseconds, then sleep: an idle pool uses no CPU.
//
// A worker that keeps losing its CPU to other processes is parked: it sleeps and takes no part, so a job must not count
// on any one worker, only on one of each group. It comes back at the start of a job. At most a quarter of the workers
// (of up to seven, one) are parked at a time, never the last of a group, and never where workers share a CPU.
class ThreadPool {
 public:
  static constexpr int kDone = -1;

  class Job {
   public:
    // Every worker that is not parked, once a phase. An exception ends the job after this phase; wait() reports it.
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
  explicit ThreadPool(const std::vector<WorkerPlace>& places, const ParkPolicy& park_policy = {});
  ~ThreadPool();  // waits for the running job

  int num_workers() const { return static_cast<int>(places_.size()); }

  // Workers of one memory node are a group; groups are numbered in order of first appearance in places.
  int num_nodes() const { return static_cast<int>(groups_.size()); }
  int node_of(int worker) const { return group_of_[worker]; }
  int numa_node(int group) const { return groups_[group].numa_node; }  // the system's number, or -1
  int workers_on(int group) const { return groups_[group].num_workers; }

  // One line: where the workers run, and why not where they should.
  const std::string& placement_report() const { return placement_report_; }

  // How often a worker was parked so far. Any thread.
  uint64_t num_parks() const { return num_parks_.load(std::memory_order_relaxed); }

  // Wakes the workers and returns. The job must live until wait() returns. A job must not be running.
  void start(Job* job, int first_phase);
  bool done() const { return finished_.value() == started_; }
  // Returns when the job is done; throws kt::Error with the first exception of a worker. Without a job: at once.
  void wait();

 private:
  struct Group {
    int numa_node;
    int num_workers;
    int num_active;
  };
  enum class State : int {
    kActive,   // takes part in phases
    kParking,  // is to park, and may not know yet
    kParked,   // knows
  };
  struct alignas(64) Worker {
    std::atomic<State> state{State::kActive};
    bool wants_to_park = false;  // written by the worker before it arrives
    uint32_t resume_after = 0;   // value of phase_starts_, written while kParked
    int64_t parked_until_ns = 0;
    LostCpu lost_cpu;
  };
  struct Placement {
    int pin_error = 0;     // errno, 0 when pinned
    int policy_error = 0;  // errno, 0 when reset
  };

  void main(int worker);
  void run_phase(int worker);
  void arrive(int worker, int num_active);
  void finish_phase();
  void park_workers();
  void resume_workers();
  bool sleep_while_parked(int worker);
  void record_error(const char* what);
  void stop();
  bool on_worker_cpu() const;
  std::string describe_placement() const;

  std::vector<WorkerPlace> places_;
  std::vector<Group> groups_;
  std::vector<int> group_of_;  // [num_workers]
  int64_t spin_ns_;
  ParkPolicy park_policy_;
  int max_parked_;
  std::vector<Worker> workers_;
  std::vector<Placement> placements_;
  std::string placement_report_;

  // Written while no worker runs a phase, published by phase_starts_.
  Job* job_ = nullptr;
  int phase_ = kDone;
  int num_active_;

  EventCount phase_starts_;
  EventCount finished_;  // jobs so far
  EventCount resumes_;   // parked workers wait on it
  uint32_t started_ = 0;
  std::atomic<bool> stopping_{false};
  std::atomic<uint64_t> num_parks_{0};
  alignas(64) std::atomic<int> arrived_{0};
  std::atomic<int> num_wanting_to_park_{0};
  std::atomic<int64_t> most_arrived_ns_{0};  // when, in this phase; 0 so far
  std::atomic<bool> failed_{false};
  std::string error_;  // of the worker that set failed_

  std::vector<std::thread> threads_;
};

}  // namespace kt
