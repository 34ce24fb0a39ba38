#include "dataset.h"

#include <algorithm>
#include <stdexcept>

#include "idx.h"

namespace demo {
namespace {

torch::Tensor to_tensor(Idx& idx) {
  return torch::from_blob(idx.bytes.data(), idx.shape, torch::kUInt8).clone();
}

Samples load_samples(const std::filesystem::path& folder, const std::string& part,
                     std::int64_t limit) {
  const auto images_path = find_idx(folder, part + "-images-idx3-ubyte");
  const auto labels_path = find_idx(folder, part + "-labels-idx1-ubyte");
  Idx images = read_idx(images_path, 3);
  Idx labels = read_idx(labels_path, 1);
  const std::int64_t count = images.shape[0];
  if (count == 0) throw std::runtime_error(images_path.string() + ": has no images");
  if (images.shape[1] != kImageSide || images.shape[2] != kImageSide) {
    throw std::runtime_error(images_path.string() + ": expected images of 28 x 28, got " +
                             std::to_string(images.shape[1]) + " x " +
                             std::to_string(images.shape[2]));
  }
  if (labels.shape[0] != count) {
    throw std::runtime_error(labels_path.string() + ": has " + std::to_string(labels.shape[0]) +
                             " labels for " + std::to_string(count) + " images");
  }
  const std::uint8_t largest = *std::max_element(labels.bytes.begin(), labels.bytes.end());
  if (largest >= kClasses) {
    throw std::runtime_error(labels_path.string() + ": expected labels 0 to 9, got " +
                             std::to_string(largest));
  }
  const std::int64_t kept = limit > 0 ? std::min(limit, count) : count;
  return {to_tensor(images).narrow(0, 0, kept).unsqueeze(1),
          to_tensor(labels).narrow(0, 0, kept).to(torch::kInt64)};
}

// "/data/kmnist/" -> "kmnist"; the one that Debian packages by its usual name.
std::string name_of(const std::filesystem::path& folder) {
  const std::filesystem::path clean = std::filesystem::absolute(folder).lexically_normal();
  const auto name = (clean.has_filename() ? clean : clean.parent_path()).filename().string();
  return name == "fashion-mnist" ? "Fashion-MNIST" : name;
}

}  // namespace

torch::Tensor to_inputs(const torch::Tensor& images) {
  return images.to(torch::kFloat).div_(127.5).sub_(1);
}

torch::Tensor Samples::inputs(std::int64_t begin, std::int64_t count) const {
  return to_inputs(images.narrow(0, begin, std::min(count, size() - begin)));
}

Dataset load_dataset(const std::filesystem::path& folder, std::int64_t limit) {
  if (!std::filesystem::is_directory(folder)) {
    throw std::runtime_error(folder.string() +
                             ": no such folder. Debian has Fashion-MNIST in the package "
                             "dataset-fashion-mnist; --data names another folder of IDX files");
  }
  return {name_of(folder), load_samples(folder, "train", limit),
          load_samples(folder, "t10k", limit)};
}

}  // namespace demo
