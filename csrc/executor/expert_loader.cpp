#include "executor/expert_loader.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <sstream>

#include "check.h"

namespace kt {
namespace {

// Large enough for full rate from disks and network file systems, small enough that all workers stay busy to the end
// and that cancelling is quick. Destinations are cut at multiples of it, so that two workers touch one huge page only
// where spans meet.
constexpr uint64_t kChunkBytes = uint64_t{8} << 20;

}  // namespace

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

void ExpertLoader::add(const FileSpan& span, uint8_t* destination) {
  const size_t file = open_file(span.path);
  bytes_total_ += span.bytes;
  for (uint64_t done = 0; done < span.bytes;) {
    const uint64_t to_boundary = kChunkBytes - reinterpret_cast<uintptr_t>(destination + done) % kChunkBytes;
    const uint64_t bytes = std::min(to_boundary, span.bytes - done);
    chunks_.push_back({file, span.offset + done, bytes, destination + done});
    done += bytes;
  }
}

void ExpertLoader::run(int, int) {
  for (size_t i; !stop_.load(std::memory_order_relaxed) &&
                 (i = next_chunk_.fetch_add(1, std::memory_order_relaxed)) < chunks_.size();)
    read(chunks_[i]);
}

void ExpertLoader::read(const Chunk& chunk) {
  for (uint64_t done = 0; done < chunk.bytes;) {
    const ssize_t got = pread(files_[chunk.file].descriptor, chunk.destination + done, chunk.bytes - done,
                              static_cast<off_t>(chunk.offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      std::ostringstream text;
      text << "reading " << chunk.bytes << " bytes at " << chunk.offset << " of " << files_[chunk.file].path;
      if (got < 0)
        text << " failed (" << std::strerror(errno) << "); check the disk and try again";
      else
        text << " met the end of the file after " << done
             << "; it became shorter while it was read, restore it and start again";
      return set_error(text.str());
    }
    done += static_cast<uint64_t>(got);
    bytes_done_.fetch_add(static_cast<uint64_t>(got), std::memory_order_relaxed);
  }
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
