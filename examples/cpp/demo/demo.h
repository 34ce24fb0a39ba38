#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "results.h"

namespace demo {

struct Options {
  std::filesystem::path data = "/usr/share/datasets/fashion-mnist";
  std::filesystem::path out = "results";
  int epochs = 3;
  std::int64_t batch_size = 128;
  std::int64_t limit = 0;  ///< images of each part; 0: all
  std::uint64_t seed = 0;
  int threads = 0;  ///< 0: as many as libtorch takes
};

/// Trains a model, quantizes it in several ways, and writes to `options.out` the models, the
/// results and their plot. Returns the results, float first. Throws where anything is wrong.
std::vector<Result> run(const Options& options);

}  // namespace demo
