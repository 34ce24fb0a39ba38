// Runs a fuzz target on random inputs: random_main [COUNT] [SEED]. The seed that it prints before
// it starts gives the same inputs again.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 1000;
  const unsigned seed = argc > 2 ? std::atoi(argv[2]) : std::random_device()();
  std::printf("%d inputs, seed %u\n", count, seed);
  std::fflush(stdout);
  std::mt19937 random(seed);
  for (int i = 0; i < count; ++i) {
    std::vector<std::uint8_t> bytes(random() % 8192);
    for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random());
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
}
