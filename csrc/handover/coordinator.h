// Answers the device's calls: the one thread that drives the executor while vLLM runs on a device.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "executor/moe_executor.h"
#include "handover/mailbox.h"
#include "numa/event_count.h"

namespace kt {

// The workers of an executor that a coordinator drives spin for this long: longer than a device takes from one MoE
// layer to the next of a decode step (0.2 ms on an H100), so that none has to be woken in it.
inline constexpr int64_t kStepSpinNanoseconds = 2'000'000;

// What a layer number in a request stands for.
struct CoordinatedLayer {
  int executor_layer;
  int top_k;
};

struct CoordinatorOptions {
  std::vector<MailboxSlot> slots;
  std::vector<CoordinatedLayer> layers;
  FloatType float_type = FloatType::BF16;
  int hidden_size = 0;
  int max_tokens = 0;                          // of a slot
  int64_t spin_ns = 2 * kStepSpinNanoseconds;  // after a call; then it takes naps
  std::vector<int> worker_cpus;                // not for the coordinator, who would take the time from a worker
  int64_t watchdog_ns = 0;  // a call that takes longer is lost; time while the process is stopped does not count
  // Called at most once, from a thread of its own, with a sentence that stderr has got; must not throw. It may end the
  // process in its own way, with close(), within kGraceNanoseconds.
  std::function<void(const std::string&)> on_failure;
};

struct CoordinatorStats {
  uint64_t num_calls = 0;    // answered, without echoes
  uint64_t num_tokens = 0;   // rows of those, padding included
  uint64_t executor_ns = 0;  // from seeing a request to the reply
  uint64_t between_ns = 0;   // from a reply to the request of a higher layer
};

inline constexpr int64_t kGraceNanoseconds = 10'000'000'000;

// From construction to destruction nobody else may call the executor. It spins after each call, takes naps of 50 us
// then, and sleeps when there were none for 100 ms; wake() ends that, or else the first call finds it within 20 ms.
//
// A call that it cannot answer, or not in time, ends the process with status 1: it says so on stderr, tells on_failure,
// and answers everything from then on with what is there, so that nothing on the device waits for ever.
class Coordinator {
 public:
  // executor null: no routed experts; every call is answered at once, and its output left as it is. The slots, and what
  // they point to, must outlive the coordinator. A request that is already there is answered.
  // Throws kt::Error where an option cannot be, or no thread be created.
  Coordinator(MoEExecutor* executor, CoordinatorOptions options);
  ~Coordinator() { close(); }

  // Answers what has been asked, then stops; the executor is free again. Idempotent; one thread at a time.
  void close();

  void wake() { wakes_.advance(); }  // calls are about to come; any thread

  CoordinatorStats stats() const;  // any thread

  // For tests: from now on no request is answered.
  void stop_answering() { deaf_.store(true, std::memory_order_relaxed); }

 private:
  void main();
  void watch();
  bool look();  // at each slot once; true when there was a request
  void answer(const MailboxSlot& slot, uint64_t request);
  void fail_once(const std::string& sentence);
  void release();

  MoEExecutor* executor_;
  CoordinatorOptions options_;
  std::vector<uint32_t> answered_;  // [slots]
  int64_t last_reply_ns_ = 0;
  int last_layer_ = kMaxMailboxTokens;  // above all layers
  EventCount wakes_;

  std::atomic<bool> stopping_{false};
  std::atomic<bool> deaf_{false};
  std::atomic<bool> failed_{false};
  std::atomic<uint64_t> num_calls_{0}, num_tokens_{0}, executor_ns_{0}, between_ns_{0};
  std::thread thread_;
  std::thread watchdog_;
};

}  // namespace kt
