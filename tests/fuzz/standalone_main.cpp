// Runs a fuzz target without libFuzzer: on the named files, or on random inputs.
// Usage: program [-runs=N] [-seed=S] [file ...]. Without a seed, or with 0, a fresh one is drawn.
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int argc, char** argv) {
  constexpr int kMaxBytes = 2000;  // several blocks of every type
  int64_t num_runs = 1000;
  uint64_t seed = 0;
  std::vector<std::string> files;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.rfind("-runs=", 0) == 0)
      num_runs = std::strtoll(argv[i] + 6, nullptr, 10);
    else if (argument.rfind("-seed=", 0) == 0)
      seed = std::strtoull(argv[i] + 6, nullptr, 10);
    else
      files.push_back(argument);
  }
  for (const std::string& file : files) {
    std::ifstream stream(file, std::ios::binary);
    if (!stream) {
      std::cerr << "cannot read " << file << "\n";
      return 1;
    }
    const std::vector<char> bytes((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    std::cout << file << ": " << bytes.size() << " bytes\n";
  }
  if (!files.empty()) return 0;
  if (seed == 0) seed = std::random_device{}() | 1u;
  std::cout << num_runs << " inputs, seed " << seed << std::endl;  // before a crash can come
  std::mt19937_64 rng(seed);
  for (int64_t run = 0; run < num_runs; ++run) {
    std::vector<uint8_t> bytes(rng() % kMaxBytes);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(rng());
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
}
