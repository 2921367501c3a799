// The fallback where a device cannot write or wait for flags: functions that the device's stream calls on the host.
#pragma once

#include <cstdint>
#include <deque>

#include "handover/mailbox.h"

namespace kt {

// What cuLaunchHostFunc takes: one to store the request, one to wait for the reply.
using HostFunction = void (*)(void* call);

// Calls live as long as this object: captured graphs hold on to them.
class HostFunctions {
 public:
  // num_tokens as of mailbox.h. The address is the argument of both functions.
  void* call(Mailbox* mailbox, int layer, int num_tokens);

  static void request(void* call);
  static void await_reply(void* call);

 private:
  struct Call {
    Mailbox* mailbox;
    uint32_t message;  // the lower half of a request
  };
  std::deque<Call> calls_;  // addresses stay
};

}  // namespace kt
