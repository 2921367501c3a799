#include <algorithm>
#include <vector>

#include "check.h"
#include "executor/expert_loader.h"
#include "numa/node_memory.h"
#include "temp_file.h"
#include "test_harness.h"

namespace kt {
namespace {

std::vector<uint8_t> random_bytes(size_t size) {
  std::vector<uint8_t> bytes(size);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(test::rng()());
  return bytes;
}

void load(ExpertLoader& loader, int num_workers) {
  ThreadPool pool(std::vector<WorkerPlace>(num_workers, {0, -1}));
  pool.start(&loader, 0);
  pool.wait();
}

TEST(node_memory) {
  CHECK(NodeMemory().data() == nullptr && NodeMemory(0, "nothing").data() == nullptr, "empty memory has an address");
  NodeMemory memory(5'000'001, "a test");
  CHECK(reinterpret_cast<uintptr_t>(memory.data()) % (2 << 20) == 0, "not on a 2 MiB boundary");
  CHECK(std::all_of(memory.data(), memory.data() + memory.size(), [](uint8_t b) { return b == 0; }), "not zero");
  std::fill_n(memory.data(), memory.size(), uint8_t{1});
  uint8_t* address = memory.data();
  NodeMemory moved(std::move(memory));
  CHECK(moved.data() == address && memory.data() == nullptr && moved.size() == 5'000'001, "moving lost the memory");
  memory = std::move(moved);
  CHECK(memory.data() == address, "moving lost the memory");
  CHECK_ERROR(NodeMemory(size_t{1} << 60, "too much"), "of too much");
}

TEST(every_byte_in_its_place) {
  const std::vector<uint8_t> contents[2] = {random_bytes(19'000'003), random_bytes(1000)};
  const test::TempFile files[2] = {test::TempFile(contents[0]), test::TempFile(contents[1])};
  for (int num_workers : {1, 3}) {
    ExpertLoader loader;
    std::vector<std::vector<uint8_t>> results;
    std::vector<const uint8_t*> sources;
    uint64_t total = 0;
    for (int i = 0; i < 12; ++i) {
      const int file = i % 2;
      const int size = static_cast<int>(contents[file].size());
      const int offset = test::random_int(0, size), bytes = test::random_int(0, size - offset);
      results.emplace_back(bytes);
      sources.push_back(contents[file].data() + offset);
      total += bytes;
      loader.add({files[file].path(), static_cast<uint64_t>(offset), static_cast<uint64_t>(bytes)},
                 results.back().data());
    }
    CHECK(loader.bytes_total() == total && loader.bytes_done() == 0, loader.bytes_total() << ", expected " << total);
    load(loader, num_workers);
    CHECK(loader.bytes_done() == total && loader.error().empty(), loader.error());
    for (size_t i = 0; i < results.size(); ++i)
      CHECK(std::equal(results[i].begin(), results[i].end(), sources[i]), "span " << i << " differs");
  }
}

TEST(errors) {
  ExpertLoader missing;
  CHECK_ERROR(missing.add({"/nowhere/at.gguf", 0, 1}, nullptr), "cannot open /nowhere/at.gguf", "No such file");

  const test::TempFile file(random_bytes(10'000));
  std::vector<uint8_t> memory(10'000);
  ExpertLoader shrunk;
  shrunk.add({file.path(), 0, 10'000}, memory.data());
  file.resize(4'000);
  load(shrunk, 2);
  CHECK(shrunk.error().find("met the end of the file") != std::string::npos, shrunk.error());

  // A directory opens, but cannot be read.
  ExpertLoader directory;
  directory.add({"/tmp", 0, 10}, memory.data());
  load(directory, 2);
  CHECK(directory.error().find("failed (Is a directory)") != std::string::npos, directory.error());
}

TEST(cancelled_before_it_began) {
  const test::TempFile file(random_bytes(10'000));
  std::vector<uint8_t> memory(10'000);
  ExpertLoader loader;
  loader.add({file.path(), 0, 10'000}, memory.data());
  loader.cancel();
  load(loader, 2);
  CHECK(loader.bytes_done() == 0 && loader.error().empty(), loader.bytes_done() << " bytes read; " << loader.error());
}

TEST(cancel) {
  const test::TempFile file({});
  const int64_t size = int64_t{256} << 20;
  file.resize(size);
  NodeMemory memory(size, "a test");
  ExpertLoader loader;
  loader.add({file.path(), 0, static_cast<uint64_t>(size)}, memory.data());
  ThreadPool pool({{0, -1}, {0, -1}});
  pool.start(&loader, 0);
  while (loader.bytes_done() == 0) std::this_thread::yield();
  loader.cancel();
  pool.wait();
  const uint64_t done = loader.bytes_done();
  CHECK(done > 0 && done <= loader.bytes_total() && loader.error().empty(), done << " bytes read; " << loader.error());
  load(loader, 2);
  CHECK(loader.bytes_done() == done, "read on after it was cancelled");
}

}  // namespace
}  // namespace kt
