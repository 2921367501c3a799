// The coordinator answers what a device asks. A thread plays the device.
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "executor/moe_executor.h"
#include "gguf/float_bits.h"
#include "handover/coordinator.h"
#include "handover/host_functions.h"
#include "kernels/dispatch.h"
#include "pool_jobs.h"
#include "temp_file.h"
#include "test_harness.h"

namespace kt {
namespace {

using std::chrono::milliseconds;

constexpr int kHidden = 64, kIntermediate = 96, kExperts = 5, kMaxTokens = 40, kMaxTopK = 6;
constexpr int64_t kLongNs = 20'000'000'000;  // no answer in this time: none will come
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr double kMaxIdleCpu = 0.05;
#else
constexpr double kMaxIdleCpu = 0.01;  // of a core
#endif
// 0.1 ms where a CPU is free; 2 to 9 ms were seen where none is.
constexpr int64_t kMaxFirstCallNs = 25'000'000;

// The host memory of a slot, and the device's side of it.
struct DeviceSlot {
  explicit DeviceSlot(FloatType type = FloatType::F32, uint32_t sequence = 0)
      : float_type(type),
        hidden_states(float_bytes(type) * kHidden * kMaxTokens),
        output(hidden_states.size()),
        ids(kMaxTokens * kMaxTopK),
        weights(kMaxTokens * kMaxTopK) {
    mailbox.request.store(uint64_t{sequence} << 32);
    mailbox.reply.store(sequence);
  }

  MailboxSlot slot() { return {&mailbox, hidden_states.data(), ids.data(), weights.data(), output.data()}; }

  void raise(int layer, int num_tokens) {
    const uint64_t sequence = sequence_of(mailbox.request.load(std::memory_order_relaxed)) + 1;
    mailbox.request.store(sequence << 32 | static_cast<uint64_t>(layer) << 16 | static_cast<uint64_t>(num_tokens),
                          std::memory_order_release);
  }
  bool answered() const {
    return mailbox.reply.load(std::memory_order_acquire) ==
           sequence_of(mailbox.request.load(std::memory_order_relaxed));
  }
  bool await() const {
    const int64_t deadline = now_ns() + kLongNs;
    while (!answered()) {
      if (now_ns() > deadline) return false;
      std::this_thread::yield();
    }
    return true;
  }

  FloatType float_type;
  Mailbox mailbox{};
  std::vector<uint8_t> hidden_states, output;
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

// What a device asks, and what has to come back.
struct Call {
  int layer, num_tokens;
  std::vector<uint8_t> hidden_states, output;
  std::vector<int32_t> ids;
  std::vector<float> weights;

  Call(FloatType type, int in_layer, int tokens, int top_k) : layer(in_layer), num_tokens(tokens) {
    for (int i = 0; i < tokens * kHidden; ++i) {
      const float value = test::random_normal();
      const uint16_t half = type == FloatType::BF16 ? f32_to_bf16(value) : f32_to_f16(value);
      const auto* bytes = reinterpret_cast<const uint8_t*>(type == FloatType::F32 ? (const void*)&value : &half);
      hidden_states.insert(hidden_states.end(), bytes, bytes + float_bytes(type));
    }
    for (int i = 0; i < tokens; ++i) {
      const bool padding = test::random_int(0, 3) == 0;
      for (int k = 0; k < top_k; ++k) {
        ids.push_back(padding ? -1 : test::random_int(-1, kExperts - 1));
        weights.push_back(test::random_normal());
      }
    }
    output.assign(hidden_states.size(), 0x5a);
  }

  void fill(DeviceSlot& slot) const {
    std::copy(hidden_states.begin(), hidden_states.end(), slot.hidden_states.begin());
    std::copy(ids.begin(), ids.end(), slot.ids.begin());
    std::copy(weights.begin(), weights.end(), slot.weights.begin());
    std::fill(slot.output.begin(), slot.output.end(), 0x5a);
  }
  bool matches(const DeviceSlot& slot) const {
    return std::equal(output.begin(), output.end(), slot.output.begin()) &&
           std::all_of(slot.output.begin() + output.size(), slot.output.end(), [](uint8_t b) { return b == 0x5a; });
  }
};

// An executor with some layers of random float32 weights, of which the coordinator knows each with a top_k of its own.
struct Experts {
  explicit Experts(const std::string& isa = "reference", const std::vector<WorkerPlace>& workers = {{0, -1}, {0, -1}},
                   bool caller_works = false)
      : executor({.isa = isa, .workers = workers, .max_num_tokens = kMaxTokens, .caller_works = caller_works}) {
    constexpr size_t kValues = size_t{kExperts} * kHidden * kIntermediate;
    for (size_t i = 0; i < layers.size(); ++i) {
      std::vector<uint8_t> contents(3 * kValues * sizeof(float));
      for (size_t at = 0; at < contents.size(); at += sizeof(float)) {
        const float value = 0.1f * test::random_normal();
        std::memcpy(&contents[at], &value, sizeof(value));
      }
      files.push_back(std::make_unique<test::TempFile>(contents));
      const auto tensor = [&](int number, int rows, int cols) {
        const uint64_t bytes = kValues * sizeof(float);
        return ExpertTensor{GgmlType::F32, kExperts, rows, cols, {{files.back()->path(), number * bytes, bytes}}};
      };
      executor.add_layer(
          {tensor(0, kIntermediate, kHidden), tensor(1, kIntermediate, kHidden), tensor(2, kHidden, kIntermediate)});
    }
    executor.start_loading();
    while (!executor.load_progress().finished) std::this_thread::yield();
  }

  // As the executor itself computes it; no coordinator may have it.
  Call random_call(FloatType type) {
    const int layer = test::random_int(0, static_cast<int>(layers.size()));
    const int num_tokens = test::random_int(0, 1) == 0 ? test::random_int(0, 2) : test::random_int(0, kMaxTokens);
    if (layer == static_cast<int>(layers.size())) {
      Call echo(type, kEchoLayer, num_tokens, 1);
      echo.output = echo.hidden_states;
      return echo;
    }
    Call call(type, layer, num_tokens, layers[layer].top_k);
    executor.submit(layers[layer].executor_layer, {call.hidden_states.data(), call.ids.data(), call.weights.data(),
                                                   call.output.data(), type, num_tokens, layers[layer].top_k});
    executor.wait();
    return call;
  }

  std::vector<CoordinatedLayer> layers = {{2, 1}, {0, kMaxTopK}, {1, 2}};
  std::vector<std::unique_ptr<test::TempFile>> files;
  MoEExecutor executor;
};

CoordinatorOptions options(const std::vector<DeviceSlot*>& slots, const std::vector<CoordinatedLayer>& layers = {}) {
  CoordinatorOptions result;
  result.layers = layers;
  result.float_type = slots[0]->float_type;
  result.hidden_size = kHidden;
  result.max_tokens = kMaxTokens;
  result.watchdog_ns = kLongNs;
  for (DeviceSlot* slot : slots) result.slots.push_back(slot->slot());
  return result;
}

// An on_failure that takes notes.
struct Failures {
  void operator()(const std::string& sentence) {
    const std::lock_guard lock(mutex);
    sentences.push_back(sentence);
    last_ns = now_ns();
  }
  std::vector<std::string> seen() {
    const std::lock_guard lock(mutex);
    return sentences;
  }
  bool await_first(int64_t limit_ns = kLongNs) {
    for (const int64_t deadline = now_ns() + limit_ns; seen().empty(); std::this_thread::sleep_for(milliseconds(1)))
      if (now_ns() > deadline) return false;
    return true;
  }
  std::mutex mutex;
  std::vector<std::string> sentences;
  int64_t last_ns = 0;
};

TEST(calls_from_two_slots_at_once) {
  for (const FloatType type : {FloatType::F32, FloatType::BF16, FloatType::F16}) {
    for (const char* isa : {"reference", "auto"}) {
      Experts experts(isa, test::some_cpus(2));
      DeviceSlot slots[2] = {DeviceSlot(type), DeviceSlot(type)};
      std::vector<Call> calls[2];
      for (auto& of_slot : calls)
        for (int i = 0; i < 100; ++i) of_slot.push_back(experts.random_call(type));
      Coordinator coordinator(&experts.executor, options({&slots[0], &slots[1]}, experts.layers));
      int lost[2] = {}, wrong[2] = {};
      const auto device = [&](int which) {
        for (const Call& call : calls[which]) {
          call.fill(slots[which]);
          slots[which].raise(call.layer, call.num_tokens);
          if (!slots[which].await()) {
            ++lost[which];
            return;
          }
          wrong[which] += !call.matches(slots[which]);
        }
      };
      std::thread other(device, 1);
      device(0);
      other.join();
      for (int which : {0, 1})
        CHECK(lost[which] == 0 && wrong[which] == 0,
              lost[which] << " lost, " << wrong[which] << " wrong, slot " << which << ", " << isa);
    }
  }
}

// As pieces of a long call are sent: one computed while the next is filled.
TEST(one_device_keeps_two_slots_busy) {
  Experts experts;
  DeviceSlot slots[2];
  std::vector<Call> calls;
  for (int i = 0; i < 60; ++i) calls.push_back(experts.random_call(FloatType::F32));
  Coordinator coordinator(&experts.executor, options({&slots[0], &slots[1]}, experts.layers));
  const auto send = [&](size_t i) {
    calls[i].fill(slots[i % 2]);
    slots[i % 2].raise(calls[i].layer, calls[i].num_tokens);
  };
  send(0), send(1);
  for (size_t i = 0; i < calls.size(); ++i) {
    CHECK(slots[i % 2].await(), "call " << i << " was lost");
    CHECK(calls[i].matches(slots[i % 2]), "call " << i << " is wrong");
    if (i + 2 < calls.size()) send(i + 2);
  }
}

// The coordinator is one of the workers.
TEST(the_coordinator_works) {
  Experts experts("auto", {{0, -1}, {1, -1}, {1, -1}}, true);
  DeviceSlot slots[2];
  std::vector<Call> calls;
  for (int i = 0; i < 40; ++i) calls.push_back(experts.random_call(FloatType::F32));
  Coordinator coordinator(&experts.executor, options({&slots[0], &slots[1]}, experts.layers));
  for (size_t i = 0; i < calls.size(); ++i) {
    DeviceSlot& slot = slots[i % 2];
    calls[i].fill(slot);
    slot.raise(calls[i].layer, calls[i].num_tokens);
    CHECK(slot.await() && calls[i].matches(slot), "call " << i << " of layer " << calls[i].layer);
  }
}

// Anybody may ask, also while calls go on.
TEST(the_first_layer_with_invalid_ids) {
  Experts experts;
  DeviceSlot slot;
  Coordinator coordinator(&experts.executor, options({&slot}, experts.layers));
  const auto first_after = [&](int layer, int32_t id) {
    const Call call(FloatType::F32, layer, 4, experts.layers[layer].top_k);
    call.fill(slot);
    slot.ids[test::random_int(0, static_cast<int>(call.ids.size()) - 1)] = id;
    slot.raise(layer, 4);
    CHECK(slot.await(), "lost");
    return experts.executor.first_layer_with_invalid_ids();
  };
  for (int layer = 0; layer < 3; ++layer) CHECK(first_after(layer, -1) == -1, "without any");
  const int first = test::random_int(0, 2), executor_layer = experts.layers[first].executor_layer;
  int seen = first_after(first, test::random_int(0, 1) == 0 ? kExperts : -2);
  CHECK(seen == executor_layer, seen << ", expected " << executor_layer);
  for (int layer = 0; layer < 3; ++layer) {
    seen = first_after(layer, kExperts);
    CHECK(seen == executor_layer, seen << " after later ones, expected " << executor_layer);
  }
  CHECK(experts.executor.num_invalid_ids() == 4, experts.executor.num_invalid_ids() << " in all");
}

TEST(no_executor) {
  DeviceSlot slot;
  Coordinator coordinator(nullptr, options({&slot}, {{0, 2}, {0, 2}}));
  for (int i = 0; i < 20; ++i) {
    Call call(FloatType::F32, test::random_int(0, 1), test::random_int(0, kMaxTokens), 2);
    call.fill(slot);
    slot.raise(call.layer, call.num_tokens);
    CHECK(slot.await(), "lost");
    CHECK(call.matches(slot), "the output was touched");
  }
}

TEST(sequence_numbers_wrap) {
  Experts experts;
  std::vector<Call> calls;
  for (int i = 0; i < 8; ++i) calls.push_back(experts.random_call(FloatType::F32));
  DeviceSlot slot(FloatType::F32, 0xfffffffc);
  Coordinator coordinator(&experts.executor, options({&slot}, experts.layers));
  for (const Call& call : calls) {
    call.fill(slot);
    slot.raise(call.layer, call.num_tokens);
    CHECK(slot.await() && call.matches(slot), "at " << slot.mailbox.request.load());
  }
  CHECK(slot.mailbox.reply.load() == 4, "reply is " << slot.mailbox.reply.load());
}

TEST(destroyed_idle_and_right_after_a_request) {
  Experts experts;
  for (int i = 0; i < 20; ++i) {
    DeviceSlot slot;
    const Call call = experts.random_call(FloatType::F32);
    call.fill(slot);
    {
      Coordinator coordinator(&experts.executor, options({&slot}, experts.layers));
      if (i == 0) std::this_thread::sleep_for(milliseconds(20));  // it naps
      if (i % 2 == 0) slot.raise(call.layer, call.num_tokens);
    }
    CHECK(slot.answered(), "the request before the end was lost");
    CHECK(i % 2 == 1 || call.matches(slot), "wrong");
    experts.random_call(FloatType::F32);  // the executor is free again
  }
}

TEST(a_request_before_the_coordinator_is_answered) {
  DeviceSlot slot;
  Call call(FloatType::F32, kEchoLayer, 3, 1);
  call.output = call.hidden_states;
  call.fill(slot);
  slot.raise(kEchoLayer, 3);
  Coordinator coordinator(nullptr, options({&slot}));
  CHECK(slot.await() && call.matches(slot), "not answered");
}

TEST(stats) {
  Experts experts;
  DeviceSlot slot;
  uint64_t num_calls = 0, num_tokens = 0;
  std::vector<Call> calls;
  for (int i = 0; i < 30; ++i) calls.push_back(experts.random_call(FloatType::F32));
  Coordinator coordinator(&experts.executor, options({&slot}, experts.layers));
  const int64_t begin = now_ns();
  for (const Call& call : calls) {
    call.fill(slot);
    slot.raise(call.layer, call.num_tokens);
    CHECK(slot.await(), "lost");
    num_calls += call.layer != kEchoLayer;
    num_tokens += call.layer != kEchoLayer ? static_cast<uint64_t>(call.num_tokens) : 0;
  }
  const uint64_t wall = static_cast<uint64_t>(now_ns() - begin);
  coordinator.close();
  const CoordinatorStats stats = coordinator.stats();
  CHECK(
      stats.num_calls == num_calls && stats.num_tokens == num_tokens,
      stats.num_calls << " calls of " << stats.num_tokens << " tokens, expected " << num_calls << " of " << num_tokens);
  CHECK(num_calls == 0 || stats.executor_ns > 0, "no time");
  CHECK(stats.executor_ns + stats.between_ns < wall,
        stats.executor_ns << " + " << stats.between_ns << " ns in " << wall);
}

TEST(a_lost_call_is_told_once) {
  constexpr int64_t kWatchdog = 300'000'000;
  Failures failures;
  DeviceSlot slots[2];
  CoordinatorOptions given = options({&slots[0], &slots[1]}, {{0, 2}, {0, 2}, {0, 2}});
  given.watchdog_ns = kWatchdog;
  given.on_failure = std::ref(failures);
  Coordinator coordinator(nullptr, given);
  for (const int64_t end = now_ns() + 2 * kWatchdog; now_ns() < end;) {  // calls, one after the other, are no hang
    slots[0].raise(test::random_int(0, 2), 1);
    CHECK(slots[0].await(), "lost");
    std::this_thread::sleep_for(milliseconds(1));
  }
  coordinator.stop_answering();
  std::this_thread::sleep_for(std::chrono::nanoseconds(3 * kWatchdog / 2));  // nor is it to be idle
  CHECK(failures.seen().empty(), "told without a cause: " << failures.seen()[0]);
  const int64_t begin = now_ns();
  slots[1].raise(2, 17);
  slots[0].raise(1, 3);
  CHECK(failures.await_first(), "nothing was told");
  const int64_t took = failures.last_ns - begin;
  CHECK(took >= kWatchdog && took < kWatchdog + 1'000'000'000, "told after " << took << " ns");
  std::this_thread::sleep_for(std::chrono::nanoseconds(2 * kWatchdog));
  CHECK(failures.seen().size() == 1, failures.seen().size() << " sentences");
  const std::string sentence = failures.seen()[0];
  const bool known = sentence.find("MoE layer 2 (17 tokens)") != std::string::npos ||
                     sentence.find("MoE layer 1 (3 tokens)") != std::string::npos;
  CHECK(known && sentence.find("within 0.3 s") != std::string::npos &&
            sentence.find("watchdog_seconds") != std::string::npos,
        sentence);
  CHECK(slots[0].await() && slots[1].await(), "the device was left waiting");
}

TEST(what_cannot_be_answered_is_told_once_and_the_device_goes_on) {
  Experts experts;
  std::vector<CoordinatedLayer> layers = experts.layers;
  layers.push_back({7, 2});  // the executor has none
  layers.push_back({0, 0});
  const struct {
    int layer, num_tokens;
    const char* part;
  } bad[] = {{5, 1, "a request is of layer 5, expected 0 to 4"},
             {0, kMaxTokens + 1, "a request is of 41 tokens, expected at most 40"},
             {kEchoLayer, kMaxMailboxTokens, "a request is of 65535 tokens"},
             {3, 1, "layer is 7, expected 0 to 2"},
             {4, 1, "top_k is 0"}};
  for (const auto& [layer, num_tokens, part] : bad) {
    Failures failures;
    DeviceSlot slot;
    CoordinatorOptions given = options({&slot}, layers);
    given.on_failure = std::ref(failures);
    Coordinator coordinator(&experts.executor, given);
    for (int i = 0; i < 3; ++i) {
      slot.raise(layer, num_tokens);
      CHECK(slot.await(), "the device was left waiting");
    }
    const std::vector<std::string> seen = failures.seen();
    CHECK(seen.size() == 1 && seen[0].find(part) != std::string::npos &&
              seen[0].find("the executor failed in MoE layer") == 0,
          seen.size() << " sentences, first: " << (seen.empty() ? "" : seen[0]) << ", expected " << part);
  }
}

struct Ended {
  int status;
  std::string text;
};

// Runs `child` in a process of its own: its exit status, and what it wrote to stderr.
Ended run_child(const std::function<void()>& child, const std::function<void(pid_t)>& meanwhile = nullptr) {
  int ends[2];
  if (pipe(ends) != 0) throw std::runtime_error("no pipe");
  const pid_t pid = fork();
  if (pid == 0) {
    dup2(ends[1], STDERR_FILENO);
    alarm(60);
    child();
    _exit(0);
  }
  close(ends[1]);
  if (meanwhile) meanwhile(pid);
  Ended ended{-1, ""};
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof(buffer))) > 0;) ended.text.append(buffer, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  waitpid(pid, &status, 0);
  ended.status = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
  return ended;
}

void say(const std::string& text) { CHECK(write(STDERR_FILENO, text.data(), text.size()) > 0, "stderr is closed"); }

TEST(a_lost_call_ends_the_process_and_frees_the_device) {
  const Ended ended = run_child([] {
    DeviceSlot slot;
    CoordinatorOptions given = options({&slot}, {{0, 2}});
    given.watchdog_ns = 100'000'000;
    Coordinator coordinator(nullptr, given);
    coordinator.stop_answering();
    slot.raise(0, 5);
    if (slot.await()) say("the device goes on\n");
    std::this_thread::sleep_for(std::chrono::seconds(10));
  });
  CHECK(ended.status == 1, "status " << ended.status << ": " << ended.text);
  CHECK(ended.text ==
            "kt_vllm: error: the executor did not answer MoE layer 0 (5 tokens) within 0.1 s, so this engine ends. If "
            "the machine is only slow, give it longer (additional_config kt.watchdog_seconds)\nthe device goes on\n",
        ended.text);
}

TEST(an_error_ends_the_process_and_frees_the_device) {
  const Ended ended = run_child([] {
    DeviceSlot slot;
    Coordinator coordinator(nullptr, options({&slot}, {{0, 2}}));
    slot.raise(1, 5);
    if (slot.await()) say("the device goes on\n");
    std::this_thread::sleep_for(std::chrono::seconds(10));
  });
  CHECK(ended.status == 1, "status " << ended.status << ": " << ended.text);
  CHECK(ended.text ==
            "kt_vllm: error: the executor failed in MoE layer 1 (5 tokens), so this engine ends: a request is of layer "
            "1, expected 0 to 0\nthe device goes on\n",
        ended.text);
}

TEST(a_stderr_that_nobody_reads_does_not_keep_the_process) {
  const int64_t begin = now_ns();
  const Ended ended = run_child([] {
    int ends[2];
    if (pipe(ends) != 0 || fcntl(ends[1], F_SETFL, O_NONBLOCK) != 0) _exit(2);
    const std::vector<char> bytes(4096);
    while (write(ends[1], bytes.data(), bytes.size()) > 0) {
    }
    fcntl(ends[1], F_SETFL, 0);
    dup2(ends[1], STDERR_FILENO);
    DeviceSlot slot;
    Coordinator coordinator(nullptr, options({&slot}, {{0, 2}}));
    slot.raise(1, 5);  // there is no such layer
    std::this_thread::sleep_for(std::chrono::seconds(20));
  });
  CHECK(ended.status == 1, "status " << ended.status);
  CHECK(now_ns() - begin < 10'000'000'000, "it took " << now_ns() - begin << " ns");
}

TEST(time_while_the_process_is_stopped_does_not_count) {
  const Ended ended = run_child(
      [] {
        Failures failures;
        DeviceSlot slot;
        CoordinatorOptions given = options({&slot}, {{0, 2}});
        given.watchdog_ns = 1'500'000'000;
        given.on_failure = std::ref(failures);
        Coordinator coordinator(nullptr, given);
        coordinator.stop_answering();
        slot.raise(0, 1);
        const int64_t begin = now_ns();
        if (!failures.await_first()) _exit(3);
        if (now_ns() - begin < 3'000'000'000) say("told before the stopped time was made up for\n");
      },
      [](pid_t pid) {
        std::this_thread::sleep_for(milliseconds(300));
        kill(pid, SIGSTOP);
        std::this_thread::sleep_for(milliseconds(2000));
        kill(pid, SIGCONT);
      });
  CHECK(ended.status == 0 && ended.text.find("told before") == std::string::npos,
        "status " << ended.status << ": " << ended.text);
}

TEST(host_functions) {
  Experts experts;
  std::vector<Call> calls;
  for (int i = 0; i < 50; ++i) calls.push_back(experts.random_call(FloatType::F32));
  DeviceSlot slot(FloatType::F32, 0xfffffff0);
  HostFunctions functions;
  std::vector<void*> arguments;
  for (const Call& call : calls) arguments.push_back(functions.call(&slot.mailbox, call.layer, call.num_tokens));
  void* any_call_of_the_slot = functions.call(&slot.mailbox, 0, 0);
  Coordinator coordinator(&experts.executor, options({&slot}, experts.layers));
  for (size_t i = 0; i < calls.size(); ++i) {
    calls[i].fill(slot);
    if (i == 25) std::this_thread::sleep_for(milliseconds(150));  // it takes long naps
    HostFunctions::request(arguments[i]);
    HostFunctions::await_reply(any_call_of_the_slot);
    CHECK(calls[i].matches(slot), "call " << i);
  }
  CHECK_ERROR(functions.call(&slot.mailbox, kEchoLayer + 1, 1), "layer is 32768, expected 0 to 32767");
  CHECK_ERROR(functions.call(&slot.mailbox, -1, 1), "layer is -1");
  CHECK_ERROR(functions.call(&slot.mailbox, 0, kMaxMailboxTokens + 1), "num_tokens is 65536, expected 0 to 65535");
}

// The host's function waits longer than it spins.
TEST(host_functions_wait_for_a_late_reply) {
  DeviceSlot slot;
  HostFunctions functions;
  void* call = functions.call(&slot.mailbox, kEchoLayer, 1);
  HostFunctions::request(call);
  std::thread late([&] {
    std::this_thread::sleep_for(milliseconds(30));
    Coordinator(nullptr, options({&slot}));
  });
  HostFunctions::await_reply(call);
  CHECK(slot.answered(), "it did not wait");
  late.join();
}

// CPU time of the coordinator's thread so far, in nanoseconds; -1 where the kernel does not tell.
int64_t coordinator_cpu_ns() {
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string name;
    std::ifstream(task.path() / "comm") >> name;
    int64_t ns = -1;
    if (name == "kt-coordinator" && std::ifstream(task.path() / "schedstat") >> ns) return ns;
  }
  return -1;
}

// The best of three: others use this machine too.
TEST(idle) {
  DeviceSlot slots[2];
  Coordinator coordinator(nullptr, options({&slots[0], &slots[1]}, {{0, 2}}));
  slots[0].raise(0, 1);
  CHECK(slots[0].await(), "lost");
  std::this_thread::sleep_for(milliseconds(200));
  if (coordinator_cpu_ns() < 0) std::cout << "not tested: this kernel does not tell the CPU time of threads\n";
  double share = 1;
  for (int i = 0; i < 3 && share >= kMaxIdleCpu; ++i) {
    const int64_t cpu = coordinator_cpu_ns(), begin = now_ns();
    std::this_thread::sleep_for(std::chrono::seconds(1));
    share = static_cast<double>(coordinator_cpu_ns() - cpu) / static_cast<double>(now_ns() - begin);
  }
  CHECK(share < kMaxIdleCpu, "an idle coordinator uses " << 100 * share << " % of a core");

  int64_t median = INT64_MAX;
  for (int i = 0; i < 3 && median >= kMaxFirstCallNs; ++i) {
    std::vector<int64_t> took;
    while (took.size() < 15) {
      std::this_thread::sleep_for(milliseconds(120) + std::chrono::microseconds(test::random_int(0, 5000)));
      coordinator.wake();
      const int64_t asked = now_ns();
      slots[1].raise(0, 1);
      while (!slots[1].answered() && now_ns() < asked + kLongNs)  // leaves the CPU to the coordinator
        std::this_thread::sleep_for(std::chrono::microseconds(20));
      took.push_back(now_ns() - asked);
    }
    std::sort(took.begin(), took.end());
    median = took[took.size() / 2];
  }
  CHECK(median < kMaxFirstCallNs, "the first call after a pause took " << median << " ns in the median");
  std::this_thread::sleep_for(milliseconds(150));
  slots[0].raise(0, 1);  // without a wake() as well
  CHECK(slots[0].await(), "lost while it slept");
  std::cout << "idle: " << 100 * share << " % of a core, first call after it " << median / 1000 << " us\n";
}

TEST(bad_options) {
  DeviceSlot slot;
  const auto refused = [&](const auto& change) {
    CoordinatorOptions given = options({&slot}, {{0, 2}});
    change(given);
    return Coordinator(nullptr, given).stats();
  };
  using Options = CoordinatorOptions;
  CHECK_ERROR(refused([](Options& o) { o.slots.clear(); }), "slots is empty");
  CHECK_ERROR(refused([](Options& o) { o.max_tokens = 0; }), "max_tokens is 0, expected 1 to 65535");
  CHECK_ERROR(refused([](Options& o) { o.max_tokens = 65536; }), "max_tokens is 65536");
  CHECK_ERROR(refused([](Options& o) { o.hidden_size = 0; }), "hidden_size is 0");
  CHECK_ERROR(refused([](Options& o) { o.layers.resize(kEchoLayer); }), "layers has 32767 entries");
  CHECK_ERROR(refused([](Options& o) { o.watchdog_ns = 0; }), "watchdog_ns is 0");
  CHECK_ERROR(refused([](Options& o) { o.slots[0].output = nullptr; }), "an address of a slot is null");
  CHECK_ERROR(refused([](Options& o) {
                o.slots[0].mailbox = reinterpret_cast<Mailbox*>(reinterpret_cast<uintptr_t>(o.slots[0].mailbox) + 8);
              }),
              "a mailbox is not aligned to 64 bytes");
}

int num_threads() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return static_cast<int>(std::distance(begin(tasks), end(tasks)));
}

// Memory for one more stack, or for none: the error comes at the second or the first thread.
TEST(threads_that_cannot_be_created) {
  constexpr size_t kStack = size_t{1} << 30;
  pthread_attr_t before, large;
  pthread_getattr_default_np(&before);
  pthread_attr_init(&large);
  pthread_attr_setstacksize(&large, kStack);
  rlimit old_limit;
  getrlimit(RLIMIT_AS, &old_limit);
  DeviceSlot slot;
  for (double stacks : {1.7, 0.7}) {
    size_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    const int threads = num_threads();
    const rlimit limit{pages * static_cast<size_t>(getpagesize()) + static_cast<size_t>(stacks * kStack),
                       old_limit.rlim_max};
    pthread_setattr_default_np(&large);
    setrlimit(RLIMIT_AS, &limit);
    std::string error = "none";
    try {
      Coordinator(nullptr, options({&slot}));
    } catch (const Error& caught) {
      error = caught.what();
    }
    setrlimit(RLIMIT_AS, &old_limit);
    pthread_setattr_default_np(&before);
    sigset_t mask;
    pthread_sigmask(SIG_BLOCK, nullptr, &mask);
    CHECK(error.find("could not be created") != std::string::npos, "error: " << error);
    CHECK(sigismember(&mask, SIGTERM) == 0, "signals stay blocked");
    CHECK(num_threads() == threads, "a thread was left behind");
  }
  pthread_attr_destroy(&before);
  pthread_attr_destroy(&large);
}

}  // namespace
}  // namespace kt
