// A file that is gone when the test is.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace kt::test {

class TempFile {
 public:
  explicit TempFile(const std::vector<uint8_t>& contents) : path_("/tmp/kt_test_XXXXXX") {
    const int descriptor = mkstemp(path_.data());
    if (descriptor < 0 || write(descriptor, contents.data(), contents.size()) != static_cast<ssize_t>(contents.size()))
      throw std::runtime_error("cannot write " + path_);
    close(descriptor);
  }
  ~TempFile() { unlink(path_.c_str()); }
  TempFile(const TempFile&) = delete;

  const std::string& path() const { return path_; }
  void resize(int64_t bytes) const {
    if (truncate(path_.c_str(), bytes) != 0) throw std::runtime_error("cannot resize " + path_);
  }

 private:
  std::string path_;
};

}  // namespace kt::test
