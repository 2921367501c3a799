#include "numa/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cfenv>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <sstream>
#include <system_error>

#include "check.h"

namespace kt {
namespace {

constexpr int kMpolDefault = 0;     // linux/mempolicy.h; libnuma is not a dependency
constexpr int kMaxCpus = 1 << 16;   // far above any kernel's NR_CPUS (8192)
constexpr int kMaxNodes = 1 << 16;  // and MAX_NUMNODES (1024)

// The mask type of the C library stops at CPU 1023; the kernel takes any length.
int set_affinity(const std::vector<unsigned long>& mask) {
  return syscall(SYS_sched_setaffinity, 0, mask.size() * sizeof(unsigned long), mask.data()) == 0 ? 0 : errno;
}

int pin_to(int cpu) {
  constexpr int kBits = 8 * sizeof(unsigned long);
  std::vector<unsigned long> mask(cpu / kBits + 1, 0);
  mask[cpu / kBits] = 1UL << (cpu % kBits);
  const int error = set_affinity(mask);
  // Not there, or not ours: run wherever this process may, rather than on the one CPU the creator is bound to.
  if (error != 0) set_affinity(std::vector<unsigned long>(kMaxCpus / kBits, ~0UL));
  return error;
}

// "1-3,8"
std::string cpu_list(std::vector<int> cpus) {
  std::sort(cpus.begin(), cpus.end());
  cpus.erase(std::unique(cpus.begin(), cpus.end()), cpus.end());
  std::ostringstream text;
  for (size_t i = 0; i < cpus.size();) {
    size_t last = i;
    while (last + 1 < cpus.size() && cpus[last + 1] == cpus[last] + 1) ++last;
    text << (i == 0 ? "" : ",") << cpus[i];
    if (last > i) text << '-' << cpus[last];
    i = last + 1;
  }
  return text.str();
}

std::vector<int> cpus_of(const std::vector<WorkerPlace>& places) {
  std::vector<int> cpus;
  for (const WorkerPlace& place : places) cpus.push_back(place.cpu);
  return cpus;
}

bool repeats(std::vector<int> cpus) {
  std::sort(cpus.begin(), cpus.end());
  return std::adjacent_find(cpus.begin(), cpus.end()) != cpus.end();
}

}  // namespace

ThreadPool::ThreadPool(const std::vector<WorkerPlace>& places, const ParkPolicy& park_policy)
    : places_(places),
      // Two workers on one CPU: who spins keeps the other from running.
      spin_ns_(repeats(cpus_of(places)) ? 0 : kSpinNanoseconds),
      park_policy_(park_policy),
      // Workers of one CPU keep each other from it: none is to blame.
      max_parked_(repeats(cpus_of(places)) ? 0 : std::max(1, static_cast<int>(places.size()) / 4)),
      workers_(places.size()),
      placements_(places.size()),
      num_active_(static_cast<int>(places.size())) {
  KT_CHECK(!places.empty(), "cpus is empty, expected the logical CPU of each worker thread, at least one");
  for (const auto& [cpu, numa_node] : places) {
    KT_CHECK(cpu >= 0 && cpu < kMaxCpus, "cpus has ", cpu, ", expected logical CPU numbers (see /proc/cpuinfo)");
    KT_CHECK(numa_node >= -1 && numa_node < kMaxNodes, "nodes has ", numa_node,
             ", expected NUMA node numbers (see /sys/devices/system/node), or -1 for none");
    const auto group = std::find_if(groups_.begin(), groups_.end(),
                                    [node = numa_node](const Group& g) { return g.numa_node == node; });
    group_of_.push_back(static_cast<int>(group - groups_.begin()));
    if (group == groups_.end())
      groups_.push_back({numa_node, 1, 1});
    else
      group->num_active = ++group->num_workers;
  }

  sigset_t blocked, before;  // inherited, so that no signal of the process is ever handled on a worker
  sigfillset(&blocked);
  // A fault of the worker itself: blocked, it would end the process without the handlers that say where.
  for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&blocked, fault);
  pthread_sigmask(SIG_SETMASK, &blocked, &before);
  started_ = 1;  // being placed counts as the first job
  threads_.reserve(places.size());
  try {
    for (int worker = 0; worker < num_workers(); ++worker) threads_.emplace_back(&ThreadPool::main, this, worker);
  } catch (const std::system_error& error) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    stop();
    fail("worker thread ", threads_.size() + 1, " of ", places.size(), " could not be created (", error.what(),
         "); ask for fewer threads or raise the limit (ulimit -u)");
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  wait();
  placement_report_ = describe_placement();
}

ThreadPool::~ThreadPool() {
  while (!done()) finished_.wait_change(started_ - 1, 0);
  stop();
}

void ThreadPool::stop() {
  stopping_.store(true, std::memory_order_relaxed);
  phase_starts_.advance();
  resumes_.advance();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::start(Job* job, int first_phase) {
  KT_CHECK(done(), "a job is started while another is running");
  job_ = job;
  phase_ = first_phase;
  ++started_;
  if (num_active_ < num_workers()) resume_workers();
  phase_starts_.advance();
}

void ThreadPool::wait() {
  // A caller that spins on a worker's CPU waits for the very thread it keeps from running.
  const int64_t spin_ns = on_worker_cpu() ? 0 : spin_ns_;
  while (!done()) finished_.wait_change(started_ - 1, spin_ns);
  if (!failed_.load(std::memory_order_relaxed)) return;
  failed_.store(false, std::memory_order_relaxed);
  fail("a worker thread failed: ", error_);
}

bool ThreadPool::on_worker_cpu() const {
  const int own = sched_getcpu();
  return std::any_of(places_.begin(), places_.end(), [own](const WorkerPlace& place) { return place.cpu == own; });
}

void ThreadPool::main(int worker) {
  char name[16];  // the kernel's limit
  std::snprintf(name, sizeof(name), "kt-worker-%d", worker);
  pthread_setname_np(pthread_self(), name);
  std::fesetenv(FE_DFL_ENV);  // rounding to nearest, subnormals kept: a thread inherits its creator's
  placements_[worker].pin_error = pin_to(places_[worker].cpu);
  placements_[worker].policy_error = syscall(SYS_set_mempolicy, kMpolDefault, nullptr, 0) == 0 ? 0 : errno;

  uint32_t seen = 0;
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_workers()) {
    arrived_.store(0, std::memory_order_relaxed);
    finished_.advance();
  }
  Worker& me = workers_[worker];
  for (;;) {
    seen = phase_starts_.wait_change(seen, spin_ns_);
    if (stopping_.load(std::memory_order_relaxed)) return;
    if (me.state.load(std::memory_order_acquire) == State::kActive) {
      const int num_active = num_active_;  // may change once this worker has arrived
      run_phase(worker);
      arrive(worker, num_active);
    } else {
      if (!sleep_while_parked(worker)) return;
      seen = me.resume_after;
    }
  }
}

void ThreadPool::run_phase(int worker) {
  try {
    job_->run(phase_, worker);
  } catch (const std::exception& error) {
    record_error(error.what());
  } catch (...) {
    record_error("unknown exception");
  }
}

void ThreadPool::arrive(int worker, int num_active) {
  if (max_parked_ > 0 && num_active > 1) {
    const int64_t now = now_ns();
    // A store that comes so late that it meets the next phase makes somebody look for nothing, no more.
    const int64_t most_arrived = most_arrived_ns_.load(std::memory_order_relaxed);
    Worker& me = workers_[worker];
    if (most_arrived != 0 && now - most_arrived > park_policy_.late_ns &&
        me.lost_cpu.arrived_late(now, now - most_arrived, groups_[group_of_[worker]].num_active, park_policy_)) {
      me.wants_to_park = true;
      num_wanting_to_park_.fetch_add(1, std::memory_order_relaxed);
    }
    const int num_arrived = arrived_.fetch_add(1, std::memory_order_acq_rel) + 1;
    if (num_arrived == num_active)
      finish_phase();
    else if (num_arrived == num_active - std::max(1, num_active / 4))
      most_arrived_ns_.store(now, std::memory_order_relaxed);
  } else if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_active) {
    finish_phase();
  }
}

// Runs on the worker that arrives last; all others wait for phase_starts_, so everything here is its own.
void ThreadPool::finish_phase() {
  arrived_.store(0, std::memory_order_relaxed);
  most_arrived_ns_.store(0, std::memory_order_relaxed);
  if (num_wanting_to_park_.load(std::memory_order_relaxed) != 0) park_workers();
  int next = kDone;
  try {
    if (!failed_.load(std::memory_order_relaxed)) next = job_->next_phase(phase_);
  } catch (const std::exception& error) {
    record_error(error.what());
  } catch (...) {
    record_error("unknown exception");
  }
  phase_ = next;
  if (next == kDone)
    finished_.advance();
  else
    phase_starts_.advance();
}

// As finish_phase(): all active workers wait.
void ThreadPool::park_workers() {
  num_wanting_to_park_.store(0, std::memory_order_relaxed);
  const int64_t until = now_ns() + park_policy_.park_ns;
  for (int worker = 0; worker < num_workers(); ++worker) {
    Worker& it = workers_[worker];
    if (it.state.load(std::memory_order_relaxed) != State::kActive || !it.wants_to_park) continue;
    it.wants_to_park = false;
    Group& group = groups_[group_of_[worker]];
    if (group.num_active == 1 || num_workers() - num_active_ >= max_parked_) continue;
    --group.num_active;
    --num_active_;
    it.parked_until_ns = until;
    it.state.store(State::kParking, std::memory_order_release);
    num_parks_.fetch_add(1, std::memory_order_relaxed);
  }
}

// Before a job starts. Who does not know yet that it was parked stays so: it might take this job's start for one that
// it has no part in.
void ThreadPool::resume_workers() {
  const int64_t now = now_ns();
  const int before = num_active_;
  for (int worker = 0; worker < num_workers(); ++worker) {
    Worker& it = workers_[worker];
    if (it.state.load(std::memory_order_acquire) != State::kParked || now < it.parked_until_ns) continue;
    ++groups_[group_of_[worker]].num_active;
    ++num_active_;
    it.resume_after = phase_starts_.value();
    it.state.store(State::kActive, std::memory_order_release);
  }
  if (num_active_ != before) resumes_.advance();
}

// False when the pool stops.
bool ThreadPool::sleep_while_parked(int worker) {
  Worker& me = workers_[worker];
  me.state.store(State::kParked, std::memory_order_release);
  uint32_t seen = resumes_.value();
  while (me.state.load(std::memory_order_acquire) != State::kActive) {
    if (stopping_.load(std::memory_order_relaxed)) return false;
    seen = resumes_.wait_change(seen, 0);
  }
  me.lost_cpu.resume(now_ns());
  return true;
}

void ThreadPool::record_error(const char* what) {
  if (!failed_.exchange(true, std::memory_order_relaxed)) error_ = what;
}

std::string ThreadPool::describe_placement() const {
  std::vector<int> pinned;
  std::map<int, std::vector<int>> refused;  // errno -> CPUs
  int policy_error = 0;
  for (int worker = 0; worker < num_workers(); ++worker) {
    const Placement& placement = placements_[worker];
    if (placement.pin_error == 0)
      pinned.push_back(places_[worker].cpu);
    else
      refused[placement.pin_error].push_back(places_[worker].cpu);
    if (placement.policy_error != 0) policy_error = placement.policy_error;
  }
  std::ostringstream text;
  text << "pinned " << pinned.size() << (pinned.size() == 1 ? " thread" : " threads");
  if (!pinned.empty()) text << (repeats(pinned) || pinned.size() > 1 ? " to CPUs " : " to CPU ") << cpu_list(pinned);
  for (const auto& [error, cpus] : refused)
    text << "; " << cpus.size() << " not pinned to CPUs " << cpu_list(cpus) << " (" << std::strerror(error)
         << "): the scheduler places them";
  if (num_nodes() > 1)
    for (int group = 0; group < num_nodes(); ++group)
      text << (group == 0 ? "; threads of NUMA node " : ", ") << numa_node(group) << ": " << workers_on(group);
  if (max_parked_ > 0 && run_delay_ns() < 0)
    text << "; no /proc/thread-self/schedstat: a thread that loses its CPU to others is waited for";
  if (policy_error != 0)
    text << "; memory policy not reset (" << std::strerror(policy_error)
         << "): pages go where the creator's policy says";
  return text.str();
}

}  // namespace kt
