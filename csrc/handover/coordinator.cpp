#include "handover/coordinator.h"

#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <sstream>
#include <system_error>

#include "check.h"
#include "numa/event_count.h"

namespace kt {
namespace {

constexpr int kPausesPerClockRead = 16;
constexpr int64_t kNapNanoseconds = 50'000;
constexpr int64_t kNapsNanoseconds = 100'000'000;
// Going to sleep and waking up takes 20 us of CPU time in a virtual machine: 0.1 % of it.
constexpr int64_t kSleepNanoseconds = 20'000'000;
constexpr int64_t kWatchNanoseconds = 50'000'000;
// From telling to releasing the device: who is told should know first. And from there to the end, where nobody is told.
constexpr int64_t kTellNanoseconds = 200'000'000, kReleaseNanoseconds = 500'000'000;
constexpr int kStderrMilliseconds = 1000;

void nap(int64_t nanoseconds) { std::this_thread::sleep_for(std::chrono::nanoseconds(nanoseconds)); }

// Away from the workers' CPUs, where the process has others.
void leave_cpus(const std::vector<int>& cpus) {
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof(mask), &mask) != 0) return;  // more CPUs than the type holds: as it is
  for (int cpu : cpus)
    if (cpu < CPU_SETSIZE) CPU_CLR(cpu, &mask);
  if (CPU_COUNT(&mask) > 0) sched_setaffinity(0, sizeof(mask), &mask);
}

std::string lost_call(uint64_t request, double seconds) {
  std::ostringstream text;
  text.precision(3);
  text << "the executor did not answer MoE layer " << layer_of(request) << " (" << num_tokens_of(request)
       << " tokens) within " << seconds << " s, so this engine ends. If the machine is only slow, give it longer "
       << "(additional_config kt.watchdog_seconds)";
  return text.str();
}

std::string failed_call(uint64_t request, const char* why) {
  std::ostringstream text;
  text << "the executor failed in MoE layer " << layer_of(request) << " (" << num_tokens_of(request)
       << " tokens), so this engine ends: " << why;
  return text.str();
}

}  // namespace

Coordinator::Coordinator(MoEExecutor* executor, CoordinatorOptions options)
    : executor_(executor), options_(std::move(options)) {
  KT_CHECK(!options_.slots.empty(), "slots is empty, expected at least one mailbox");
  KT_CHECK(options_.max_tokens >= 1 && options_.max_tokens <= kMaxMailboxTokens, "max_tokens is ", options_.max_tokens,
           ", expected 1 to ", kMaxMailboxTokens);
  KT_CHECK(options_.hidden_size >= 1, "hidden_size is ", options_.hidden_size, ", expected at least 1");
  KT_CHECK(options_.layers.size() < kEchoLayer, "layers has ", options_.layers.size(), " entries, expected below ",
           kEchoLayer);
  KT_CHECK(options_.spin_ns >= 0, "spin_ns is ", options_.spin_ns, ", expected at least 0");
  KT_CHECK(options_.watchdog_ns > 0, "watchdog_ns is ", options_.watchdog_ns, ", expected more than 0");
  for (const MailboxSlot& slot : options_.slots) {
    KT_CHECK(slot.mailbox && slot.hidden_states && slot.topk_ids && slot.topk_weights && slot.output,
             "an address of a slot is null, expected pinned host memory");
    KT_CHECK(reinterpret_cast<uintptr_t>(slot.mailbox) % alignof(Mailbox) == 0, "a mailbox is not aligned to ",
             alignof(Mailbox), " bytes");
    answered_.push_back(slot.mailbox->reply.load(std::memory_order_relaxed));
  }
  sigset_t all, before;  // signals are for the threads of the process that expect them
  sigfillset(&all);
  for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&all, fault);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread(&Coordinator::main, this);
    watchdog_ = std::thread(&Coordinator::watch, this);
  } catch (const std::system_error& error) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    close();
    fail("the threads that answer the device could not be created (", error.what(), "); raise the limit (ulimit -u)");
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Coordinator::close() {
  stopping_.store(true, std::memory_order_release);
  if (thread_.joinable()) thread_.join();
  if (watchdog_.joinable()) watchdog_.join();
}

CoordinatorStats Coordinator::stats() const {
  return {num_calls_.load(std::memory_order_relaxed), num_tokens_.load(std::memory_order_relaxed),
          executor_ns_.load(std::memory_order_relaxed), between_ns_.load(std::memory_order_relaxed)};
}

void Coordinator::main() {
  pthread_setname_np(pthread_self(), "kt-coordinator");
  prctl(PR_SET_TIMERSLACK, 1);  // naps as short as asked for; the default adds 50 us
  if (executor_ == nullptr || !executor_->adopt_calling_thread()) leave_cpus(options_.worker_cpus);
  last_reply_ns_ = now_ns();
  uint32_t wakes = wakes_.value();
  int64_t busy_ns = last_reply_ns_;  // when there last was a call, or was one to come
  while (true) {
    bool found = false;
    for (int i = 0; i < kPausesPerClockRead && !found; ++i) {
      found = look();
      if (!found) __builtin_ia32_pause();
    }
    if (found) continue;
    if (stopping_.load(std::memory_order_acquire)) {
      while (look()) {  // what was asked before close(), and after the last look
      }
      return;
    }
    const int64_t now = now_ns();
    const uint32_t seen = wakes_.value();
    busy_ns = seen == wakes ? std::max(busy_ns, last_reply_ns_) : now;
    wakes = seen;
    if (now - busy_ns > kNapsNanoseconds)
      wakes_.sleep_until_change(wakes, kSleepNanoseconds);
    else if (now - busy_ns > options_.spin_ns)
      nap(kNapNanoseconds);
  }
}

bool Coordinator::look() {
  bool found = false;
  for (size_t i = 0; i < options_.slots.size(); ++i) {
    const uint64_t request = options_.slots[i].mailbox->request.load(std::memory_order_acquire);
    if (sequence_of(request) == answered_[i] || deaf_.load(std::memory_order_relaxed)) continue;
    found = true;
    try {
      answer(options_.slots[i], request);
    } catch (const std::exception& error) {
      fail_once(failed_call(request, error.what()));
    }
    answered_[i] = sequence_of(request);
    options_.slots[i].mailbox->reply.store(answered_[i], std::memory_order_release);
  }
  return found;
}

void Coordinator::answer(const MailboxSlot& slot, uint64_t request) {
  const int64_t begin = now_ns();
  const int layer = layer_of(request), num_tokens = num_tokens_of(request);
  KT_CHECK(num_tokens <= options_.max_tokens, "a request is of ", num_tokens, " tokens, expected at most ",
           options_.max_tokens);
  if (layer == kEchoLayer) {
    std::memcpy(slot.output, slot.hidden_states,
                float_bytes(options_.float_type) * options_.hidden_size * static_cast<size_t>(num_tokens));
    last_reply_ns_ = begin;
    return;
  }
  KT_CHECK(layer < static_cast<int>(options_.layers.size()), "a request is of layer ", layer, ", expected 0 to ",
           static_cast<int>(options_.layers.size()) - 1);
  if (executor_ != nullptr) {
    executor_->submit(options_.layers[layer].executor_layer, {.hidden_states = slot.hidden_states,
                                                              .topk_ids = slot.topk_ids,
                                                              .topk_weights = slot.topk_weights,
                                                              .output = slot.output,
                                                              .float_type = options_.float_type,
                                                              .num_tokens = num_tokens,
                                                              .top_k = options_.layers[layer].top_k});
    executor_->wait();
  }
  const int64_t end = now_ns();
  const auto add = [](std::atomic<uint64_t>& sum, int64_t value) {
    sum.store(sum.load(std::memory_order_relaxed) + static_cast<uint64_t>(value), std::memory_order_relaxed);
  };
  add(num_calls_, 1);
  add(num_tokens_, num_tokens);
  add(executor_ns_, end - begin);
  // A lower layer, or the same, begins another step.
  if (layer > last_layer_) add(between_ns_, begin - last_reply_ns_);
  last_layer_ = layer;
  last_reply_ns_ = end;
}

// A thread of its own: the coordinator may be what hangs, and Python's threads may wait for the device.
void Coordinator::watch() {
  pthread_setname_np(pthread_self(), "kt-watchdog");
  struct Seen {
    uint64_t request = 0;
    int64_t waited_ns = 0;
  };
  std::vector<Seen> seen(options_.slots.size());
  for (int64_t last = now_ns(), now; !stopping_.load(std::memory_order_relaxed); last = now) {
    nap(kWatchNanoseconds);
    now = now_ns();
    for (size_t i = 0; i < seen.size(); ++i) {
      const Mailbox& mailbox = *options_.slots[i].mailbox;
      const uint64_t request = mailbox.request.load(std::memory_order_acquire);
      if (request != seen[i].request || mailbox.reply.load(std::memory_order_acquire) == sequence_of(request)) {
        seen[i] = {request, 0};
        continue;
      }
      // A process that was stopped (docker pause, a debugger) comes back after any time, and its coordinator too.
      seen[i].waited_ns += std::min(now - last, 2 * kWatchNanoseconds);
      if (seen[i].waited_ns > options_.watchdog_ns)
        fail_once(lost_call(request, static_cast<double>(options_.watchdog_ns) * 1e-9));
    }
  }
}

void Coordinator::fail_once(const std::string& sentence) {
  if (failed_.exchange(true)) return;
  const std::string line = "kt_vllm: error: " + sentence + "\n";
  // A pipe that nobody reads must not keep the process, and with it the device. A short line fits where poll() says so.
  pollfd output{.fd = STDERR_FILENO, .events = POLLOUT, .revents = 0};
  if (poll(&output, 1, kStderrMilliseconds) == 1) [[maybe_unused]]
    const ssize_t written = write(STDERR_FILENO, line.data(), std::min<size_t>(line.size(), PIPE_BUF));
  int64_t left = kReleaseNanoseconds;
  if (options_.on_failure) {
    std::thread(options_.on_failure, sentence).detach();  // it may wait for locks of threads that wait for the device
    nap(kTellNanoseconds);
    left = kGraceNanoseconds;
  }
  for (const int64_t deadline = now_ns() + left; now_ns() < deadline; nap(kNapNanoseconds)) {
    if (stopping_.load(std::memory_order_acquire)) return;
    release();
  }
  _exit(1);
}

void Coordinator::release() {
  for (const MailboxSlot& slot : options_.slots)
    slot.mailbox->reply.store(sequence_of(slot.mailbox->request.load(std::memory_order_acquire)),
                              std::memory_order_release);
}

}  // namespace kt
