#include "executor/expert_loader.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <sstream>

#include "check.h"
#include "kernels/panel.h"
#include "numa/node_memory.h"

namespace kt {
namespace {

// What a worker takes at once. Large enough for full rate from disks and network file systems, small enough that all
// workers stay busy to the end. Destinations are cut near multiples of it, so that two workers seldom touch one huge
// page.
constexpr uint64_t kChunkBytes = uint64_t{8} << 20;

// What is read at once to be packed: half of an L2 of 2 MiB, so that the packing finds it there. At least one panel.
constexpr size_t kStagingBytes = size_t{1} << 20;

}  // namespace

// A worker's buffer between file and panel; memory only once it is needed.
class ExpertLoader::Staging {
 public:
  uint8_t* reserve(size_t bytes) {
    if (memory_.size() < bytes) memory_ = NodeMemory(bytes, "loading expert weights");
    return memory_.data();
  }

 private:
  NodeMemory memory_;
};

ExpertLoader::~ExpertLoader() {
  for (const File& file : files_) close(file.descriptor);
}

size_t ExpertLoader::open_file(const std::string& path) {
  const auto found = file_of_path_.find(path);
  if (found != file_of_path_.end()) return found->second;
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  KT_CHECK(descriptor >= 0, "cannot open ", path, " (", std::strerror(errno), "); check that it is there and readable");
  posix_fadvise(descriptor, 0, 0, POSIX_FADV_SEQUENTIAL);  // a hint: read further ahead
  files_.push_back({path, descriptor});
  return file_of_path_[path] = files_.size() - 1;
}

void ExpertLoader::add(const ExpertTensor& tensor, RowRange rows, int panel_rows, int group, uint8_t* destination) {
  auto slice = std::make_unique<Slice>();
  *slice = {.type = tensor.type,
            .k = tensor.num_cols,
            .row_bytes = ggml_row_bytes(tensor.type, tensor.num_cols),
            .num_rows = tensor.num_rows,
            .rows = rows,
            .panel_rows = panel_rows,
            .panels = static_cast<size_t>((rows.size() + panel_rows - 1) / panel_rows),
            .destination = destination,
            .spans = {}};
  uint64_t begin = 0;
  for (const FileSpan& span : tensor.spans) {
    slice->spans.push_back({open_file(span.path), span.offset, begin, span.bytes});
    begin += span.bytes;
  }
  KT_CHECK(begin == slice->row_bytes * tensor.num_rows * tensor.num_experts, "the spans to load hold ", begin,
           " bytes, expected ", slice->row_bytes * tensor.num_rows * tensor.num_experts,
           "; the GGUF's tensor table is wrong");
  bytes_total_ += slice->row_bytes * rows.size() * tensor.num_experts;

  const size_t panel_bytes = slice->row_bytes * panel_rows;
  const size_t num_panels = slice->panels * tensor.num_experts;
  for (size_t first = 0; first < num_panels;) {
    const uintptr_t base = reinterpret_cast<uintptr_t>(destination);
    const uintptr_t boundary = ((base + first * panel_bytes) / kChunkBytes + 1) * kChunkBytes;
    const size_t end = std::clamp((boundary - base) / panel_bytes, first + 1, num_panels);
    queues_[group].chunks.push_back({slice.get(), first, end});
    first = end;
  }
  slices_.push_back(std::move(slice));
}

void ExpertLoader::run(int, int worker) {
  Queue& queue = queues_[pool_.node_of(worker)];
  Staging staging;
  for (size_t i; !stopped() && (i = queue.next.fetch_add(1, std::memory_order_relaxed)) < queue.chunks.size();)
    load(queue.chunks[i], staging);
}

void ExpertLoader::load(const Chunk& chunk, Staging& staging) {
  const Slice& slice = *chunk.slice;
  const size_t panel_bytes = slice.row_bytes * slice.panel_rows;
  const bool whole = slice.rows.size() == slice.num_rows;
  for (size_t panel = chunk.first_panel; panel < chunk.end_panel;) {
    const size_t expert = panel / slice.panels;
    // As they are in the file, all rows of one expert after another are one run.
    const size_t end =
        whole && slice.panel_rows == 1 ? chunk.end_panel : std::min(chunk.end_panel, (expert + 1) * slice.panels);
    const int row = slice.rows.begin + static_cast<int>(panel % slice.panels) * slice.panel_rows;  // of the expert
    const uint64_t first_row = uint64_t{expert} * slice.num_rows + row;                            // of the tensor
    uint8_t* destination = slice.destination + panel * panel_bytes;
    if (slice.panel_rows == 1) {
      if (!read_rows(slice, first_row, end - panel, destination)) return;
    } else {
      const int64_t num_rows = std::min<int64_t>((end - panel) * slice.panel_rows, slice.rows.end - row);
      if (!pack(slice, first_row, static_cast<int>(num_rows), destination, staging)) return;
    }
    panel = end;
  }
}

// The rows begin a panel.
bool ExpertLoader::pack(const Slice& slice, uint64_t first_row, int num_rows, uint8_t* destination, Staging& staging) {
  const size_t panel_bytes = slice.row_bytes * slice.panel_rows;
  const int batch = static_cast<int>(std::max<size_t>(1, kStagingBytes / panel_bytes)) * slice.panel_rows;
  uint8_t* buffer = staging.reserve(std::max(kStagingBytes, panel_bytes));
  for (int done = 0; done < num_rows; done += batch) {
    const int rows = std::min(batch, num_rows - done);
    if (stopped() || !read_rows(slice, first_row + done, rows, buffer)) return false;
    for (int row = 0; row < rows; row += slice.panel_rows, destination += panel_bytes)
      pack_panel(slice.type, buffer + row * slice.row_bytes, slice.row_bytes, std::min(slice.panel_rows, rows - row),
                 slice.k, destination);
  }
  return true;
}

bool ExpertLoader::read_rows(const Slice& slice, uint64_t first_row, uint64_t num_rows, uint8_t* destination) {
  const uint64_t end = (first_row + num_rows) * slice.row_bytes;
  uint64_t at = first_row * slice.row_bytes;
  auto span = std::upper_bound(slice.spans.begin(), slice.spans.end(), at,
                               [](uint64_t value, const Span& next) { return value < next.begin; }) -
              1;
  for (; at < end; ++span) {
    const uint64_t bytes = std::min(end, span->begin + span->bytes) - at;
    if (!read(files_[span->file], span->offset + (at - span->begin), bytes, destination)) return false;
    at += bytes;
    destination += bytes;
  }
  return true;
}

bool ExpertLoader::read(const File& file, uint64_t offset, uint64_t bytes, uint8_t* destination) {
  for (uint64_t done = 0; done < bytes;) {
    const ssize_t got = pread(file.descriptor, destination + done, bytes - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      std::ostringstream text;
      text << "reading " << bytes << " bytes at " << offset << " of " << file.path;
      if (got < 0)
        text << " failed (" << std::strerror(errno) << "); check the disk and try again";
      else
        text << " met the end of the file after " << done
             << "; it became shorter while it was read, restore it and start again";
      set_error(text.str());
      return false;
    }
    done += static_cast<uint64_t>(got);
    bytes_done_.fetch_add(static_cast<uint64_t>(got), std::memory_order_relaxed);
  }
  return true;
}

void ExpertLoader::set_error(const std::string& text) {
  const std::lock_guard lock(error_mutex_);
  if (error_.empty()) error_ = text;
  stop_.store(true, std::memory_order_relaxed);
}

std::string ExpertLoader::error() const {
  const std::lock_guard lock(error_mutex_);
  return error_;
}

}  // namespace kt
