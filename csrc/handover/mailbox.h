// What the device and the coordinator write to each other, in host memory that both see.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace kt {

// One call at a time. The device fills the slot's staging buffers, then stores `request`; the coordinator computes,
// then stores its sequence number in `reply`, for which the device waits before it touches the slot again. Sequence
// numbers count up from 1, wrap, and are compared for equality. Each word has a cache line, since each has one writer.
struct Mailbox {
  // sequence number << 32 | layer << 16 | num_tokens: one 8-byte store, so that it arrives whole.
  alignas(64) std::atomic<uint64_t> request;
  alignas(64) std::atomic<uint32_t> reply;
};
static_assert(sizeof(Mailbox) == 128 && offsetof(Mailbox, reply) == 64, "kt_vllm/handover/staging.py lays it out");

inline constexpr int kMaxMailboxTokens = 0xffff;
// As a layer: copy the hidden states to the output. Shows that the way works, and what it costs.
inline constexpr int kEchoLayer = 0x7fff;  // the highest: a message is a positive 32-bit number

constexpr uint32_t sequence_of(uint64_t request) { return static_cast<uint32_t>(request >> 32); }
constexpr int layer_of(uint64_t request) { return static_cast<int>(request >> 16 & 0xffff); }
constexpr int num_tokens_of(uint64_t request) { return static_cast<int>(request & 0xffff); }

// A mailbox with the buffers of its calls: rows of the pinned memory that the device reads and writes.
struct MailboxSlot {
  Mailbox* mailbox;
  const void* hidden_states;  // [max_tokens, hidden_size]
  const int32_t* topk_ids;    // [max_tokens, top_k]
  const float* topk_weights;  // [max_tokens, top_k]
  void* output;               // [max_tokens, hidden_size]
};

}  // namespace kt
