#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include <torch/types.h>

namespace demo {

constexpr std::int64_t kImageSide = 28;
constexpr std::int64_t kClasses = 10;

/// Images and what they show.
struct Samples {
  torch::Tensor images;  ///< (n, 1, 28, 28) uint8
  torch::Tensor labels;  ///< (n) int64, 0 to 9

  std::int64_t size() const { return labels.size(0); }
  /// What the model takes: `count` images from `begin` on, fp32 in [-1, 1].
  torch::Tensor inputs(std::int64_t begin, std::int64_t count) const;
};

/// uint8 pixels as the model takes them.
torch::Tensor to_inputs(const torch::Tensor& images);

struct Dataset {
  std::string name;
  Samples train;
  Samples test;
};

/// The four files of an MNIST-like data set in `folder`, the first `limit` images of each part
/// (0: all). std::runtime_error that names the file or folder where something is wrong with it.
Dataset load_dataset(const std::filesystem::path& folder, std::int64_t limit);

}  // namespace demo
