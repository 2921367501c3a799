#include "handover/host_functions.h"

#include <chrono>
#include <thread>

#include "check.h"
#include "numa/event_count.h"

namespace kt {

void* HostFunctions::call(Mailbox* mailbox, int layer, int num_tokens) {
  KT_CHECK(layer >= 0 && layer <= kEchoLayer, "layer is ", layer, ", expected 0 to ", kEchoLayer);
  KT_CHECK(num_tokens >= 0 && num_tokens <= kMaxMailboxTokens, "num_tokens is ", num_tokens, ", expected 0 to ",
           kMaxMailboxTokens);
  calls_.push_back({mailbox, static_cast<uint32_t>(layer) << 16 | static_cast<uint32_t>(num_tokens)});
  return &calls_.back();
}

void HostFunctions::request(void* call) {
  const Call& my = *static_cast<const Call*>(call);
  const uint32_t sequence = sequence_of(my.mailbox->request.load(std::memory_order_relaxed)) + 1;
  my.mailbox->request.store(uint64_t{sequence} << 32 | my.message, std::memory_order_release);
}

void HostFunctions::await_reply(void* call) {
  const Mailbox& mailbox = *static_cast<const Call*>(call)->mailbox;
  const uint32_t sequence = sequence_of(mailbox.request.load(std::memory_order_relaxed));
  // A decode step's layer takes a millisecond or two; a prefill's is worth a nap.
  const int64_t spin_until = now_ns() + 5'000'000;
  while (mailbox.reply.load(std::memory_order_acquire) != sequence) {
    if (now_ns() < spin_until)
      __builtin_ia32_pause();
    else
      std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

}  // namespace kt
