#include <algorithm>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "executor/expert_loader.h"
#include "kernels/panel.h"
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

std::vector<WorkerPlace> places(const std::vector<int>& nodes) {
  std::vector<WorkerPlace> result;
  for (int node : nodes) result.push_back({0, node});
  return result;
}

void load(ExpertLoader& loader, ThreadPool& pool) {
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

// One expert with a single row of float32.
ExpertTensor one_row(const std::string& path, int64_t bytes) {
  return {GgmlType::F32, 1, 1, static_cast<int>(bytes / 4), {{path, 0, static_cast<uint64_t>(bytes)}}};
}

// A tensor of random bytes, cut into spans anywhere, in two files among other bytes.
struct Source {
  explicit Source(GgmlType type) {
    const int block_size = ggml_type_info(type).block_size;
    tensor = {type, test::random_int(1, 6), test::random_int(1, 80), block_size * test::random_int(1, 3), {}};
    row_bytes = ggml_row_bytes(type, tensor.num_cols);
    bytes = random_bytes(row_bytes * tensor.num_rows * tensor.num_experts);
    std::vector<uint8_t> contents[2];
    std::vector<int> file_of_span;
    for (size_t done = 0; done < bytes.size();) {
      const int file = test::random_int(0, 1);
      const size_t size = std::min<size_t>(bytes.size() - done, test::random_int(0, static_cast<int>(bytes.size())));
      contents[file].resize(contents[file].size() + test::random_int(0, 100));
      tensor.spans.push_back({"", contents[file].size(), size});
      file_of_span.push_back(file);
      contents[file].insert(contents[file].end(), &bytes[done], &bytes[done] + size);
      done += size;
    }
    for (int i = 0; i < 2; ++i) files.push_back(std::make_unique<test::TempFile>(contents[i]));
    for (size_t i = 0; i < file_of_span.size(); ++i) tensor.spans[i].path = files[file_of_span[i]]->path();
  }

  // What the loader is to put into memory.
  std::vector<uint8_t> expected(RowRange rows, int panel_rows) const {
    std::vector<uint8_t> result;
    for (int expert = 0; expert < tensor.num_experts; ++expert) {
      for (int row = rows.begin; row < rows.end; row += panel_rows) {
        const uint8_t* from = &bytes[(size_t(expert) * tensor.num_rows + row) * row_bytes];
        result.resize(result.size() + row_bytes * panel_rows);
        uint8_t* panel = &result[result.size() - row_bytes * panel_rows];
        if (panel_rows == 1)
          std::copy_n(from, row_bytes, panel);
        else
          pack_panel(tensor.type, from, row_bytes, std::min(panel_rows, rows.end - row), tensor.num_cols, panel);
      }
    }
    return result;
  }

  ExpertTensor tensor;
  size_t row_bytes;
  std::vector<uint8_t> bytes;
  std::vector<std::unique_ptr<test::TempFile>> files;
};

TEST(every_byte_in_its_place) {
  for (const std::vector<int>& nodes : {std::vector<int>{-1}, {0, 0, 0}, {0, 1, 1}, {2, 0, 1, 0}}) {
    for (int round = 0; round < 20; ++round) {
      ThreadPool pool(places(nodes));
      std::vector<int> shares;
      for (int group = 0; group < pool.num_nodes(); ++group) shares.push_back(pool.workers_on(group));
      ExpertLoader loader(pool);
      std::vector<std::vector<uint8_t>> results, expected;
      uint64_t total = 0;
      for (GgmlType type : {GgmlType::F32, GgmlType::Q8_0, GgmlType::Q6_K, GgmlType::F16}) {
        const Source source(type);  // its files may go: they are open
        const int panel_rows = test::random_int(0, 1) == 0 ? 1 : kPanelRows;
        const std::vector<RowRange> slices = split_rows(source.tensor.num_rows, 16, shares);
        for (size_t slice = 0; slice < slices.size(); ++slice) {
          expected.push_back(source.expected(slices[slice], panel_rows));
          results.emplace_back(expected.back().size(), uint8_t{0xA5});
          loader.add(source.tensor, slices[slice], panel_rows, static_cast<int>(slice), results.back().data());
        }
        total += source.bytes.size();
      }
      CHECK(loader.bytes_total() == total && loader.bytes_done() == 0, loader.bytes_total() << ", expected " << total);
      load(loader, pool);
      CHECK(loader.bytes_done() == total && loader.error().empty(), loader.error());
      for (size_t i = 0; i < results.size(); ++i) CHECK(results[i] == expected[i], "slice " << i << " differs");
    }
  }
}

// Larger than a chunk and than the buffer in which rows are packed.
TEST(large_tensors) {
  const int num_rows = 999, num_cols = 1024;
  const size_t row_bytes = ggml_row_bytes(GgmlType::F32, num_cols);
  const std::vector<uint8_t> contents = random_bytes(row_bytes * num_rows * 3);
  const test::TempFile file(contents);
  const ExpertTensor tensor{GgmlType::F32, 3, num_rows, num_cols, {{file.path(), 0, contents.size()}}};
  ThreadPool pool(places({-1, -1}));
  const int padded = (num_rows + kPanelRows - 1) / kPanelRows * kPanelRows;
  NodeMemory rows(contents.size(), "a test"), panels(row_bytes * padded * 3, "a test");
  ExpertLoader loader(pool);
  loader.add(tensor, {0, num_rows}, 1, 0, rows.data());
  loader.add(tensor, {0, num_rows}, kPanelRows, 0, panels.data());
  load(loader, pool);
  CHECK(loader.bytes_done() == 2 * contents.size() && loader.error().empty(), loader.error());
  CHECK(std::equal(contents.begin(), contents.end(), rows.data()), "rows differ");
  std::vector<uint8_t> panel(row_bytes * kPanelRows);
  for (int expert = 0; expert < 3; ++expert) {
    for (int row = 0; row < num_rows; row += kPanelRows) {
      pack_panel(GgmlType::F32, &contents[(size_t(expert) * num_rows + row) * row_bytes], row_bytes,
                 std::min(kPanelRows, num_rows - row), num_cols, panel.data());
      CHECK(std::equal(panel.begin(), panel.end(), panels.data() + (size_t(expert) * padded + row) * row_bytes),
            "the panel of row " << row << " differs");
    }
  }
}

TEST(errors) {
  ThreadPool pool(places({-1, -1}));
  ExpertLoader missing(pool);
  CHECK_ERROR(missing.add(one_row("/nowhere/at.gguf", 4), {0, 1}, 1, 0, nullptr), "cannot open /nowhere/at.gguf",
              "No such file");

  const test::TempFile file(random_bytes(10'000));
  std::vector<uint8_t> memory(16 * 10'000);
  for (int panel_rows : {1, kPanelRows}) {
    file.resize(10'000);
    ExpertLoader shrunk(pool);
    shrunk.add(one_row(file.path(), 10'000), {0, 1}, panel_rows, 0, memory.data());
    file.resize(4'000);
    load(shrunk, pool);
    CHECK(shrunk.error().find("met the end of the file") != std::string::npos, shrunk.error());
  }

  // Past the end, and where the offset is none that a file can have.
  for (uint64_t offset : {uint64_t{4'000}, uint64_t{1} << 40, uint64_t{1} << 63, ~uint64_t{0}, ~uint64_t{0} - 7}) {
    for (int panel_rows : {1, kPanelRows}) {
      ExpertTensor tensor = one_row(file.path(), 8);
      tensor.spans[0].offset = offset;
      ExpertLoader beyond(pool);
      beyond.add(tensor, {0, 1}, panel_rows, 0, memory.data());
      load(beyond, pool);
      CHECK(beyond.error().find("reading 8 bytes at " + std::to_string(offset)) == 0, beyond.error());
      CHECK(beyond.bytes_done() == 0, beyond.bytes_done() << " bytes read");
    }
  }
  ExpertTensor short_of_it = one_row(file.path(), 8);
  short_of_it.spans[0].bytes = 4;
  ExpertLoader incomplete(pool);
  CHECK_ERROR(incomplete.add(short_of_it, {0, 1}, 1, 0, memory.data()), "hold 4 bytes, expected 8");
  short_of_it.spans.clear();
  CHECK_ERROR(incomplete.add(short_of_it, {0, 1}, 1, 0, memory.data()), "hold 0 bytes, expected 8");

  // A directory opens, but cannot be read.
  ExpertLoader directory(pool);
  directory.add(one_row("/tmp", 8), {0, 1}, 1, 0, memory.data());
  load(directory, pool);
  CHECK(directory.error().find("failed (Is a directory)") != std::string::npos, directory.error());
}

TEST(cancelled_before_it_began) {
  const test::TempFile file(random_bytes(10'000));
  std::vector<uint8_t> memory(10'000);
  ThreadPool pool(places({-1, -1}));
  ExpertLoader loader(pool);
  loader.add(one_row(file.path(), 10'000), {0, 1}, 1, 0, memory.data());
  loader.cancel();
  load(loader, pool);
  CHECK(loader.bytes_done() == 0 && loader.error().empty(), loader.bytes_done() << " bytes read; " << loader.error());
}

TEST(cancel) {
  const test::TempFile file({});
  const int64_t size = int64_t{256} << 20;
  file.resize(size);
  const ExpertTensor tensor{GgmlType::F32, 4, 4096, 4096, {{file.path(), 0, static_cast<uint64_t>(size)}}};
  ThreadPool pool(places({-1, -1}));
  for (int panel_rows : {1, kPanelRows}) {
    NodeMemory memory(size, "a test");
    ExpertLoader loader(pool);
    loader.add(tensor, {0, 4096}, panel_rows, 0, memory.data());
    pool.start(&loader, 0);
    while (loader.bytes_done() == 0) std::this_thread::yield();
    loader.cancel();
    pool.wait();
    const uint64_t done = loader.bytes_done();
    CHECK(done > 0 && done <= loader.bytes_total() && loader.error().empty(),
          done << " bytes read; " << loader.error());
    load(loader, pool);
    CHECK(loader.bytes_done() == done, "read on after it was cancelled");
  }
}

}  // namespace
}  // namespace kt
