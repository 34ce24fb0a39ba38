#include "dataset.h"

#include <torch/torch.h>

#include <gmock/gmock.h>

#include "scratch_folder.h"

namespace demo {
namespace {

using testing::HasSubstr;

std::string error_loading(const ScratchFolder& folder) {
  return error_of([&] { load_dataset(folder.path(), 0); });
}

TEST(Dataset, loads_images_and_labels) {
  const ScratchFolder folder;
  write_dataset(folder.path(), 12);
  const Dataset data = load_dataset(folder.path(), 0);
  EXPECT_EQ(data.name, folder.path().filename());
  EXPECT_EQ(data.train.images.sizes(), at::IntArrayRef({12, 1, 28, 28}));
  EXPECT_EQ(data.test.labels.sizes(), at::IntArrayRef({12}));
  EXPECT_EQ(data.test.labels[11].item<int>(), 1);
}

TEST(Dataset, limit_keeps_the_first_images) {
  const ScratchFolder folder;
  write_dataset(folder.path(), 12);
  const Dataset data = load_dataset(folder.path(), 5);
  EXPECT_EQ(data.train.size(), 5);
  EXPECT_EQ(data.test.images.size(0), 5);
  EXPECT_EQ(load_dataset(folder.path(), 100).train.size(), 12);
}

TEST(Dataset, inputs_are_in_minus_one_to_one_and_end_with_the_data) {
  const ScratchFolder folder;
  write_dataset(folder.path(), 3);
  std::string pixels(3UL * 784, '\0');
  pixels.back() = '\xff';
  write_plain(folder / "t10k-images-idx3-ubyte", idx_bytes({3, 28, 28}, pixels));
  const torch::Tensor inputs = load_dataset(folder.path(), 0).test.inputs(1, 128);
  EXPECT_EQ(inputs.sizes(), at::IntArrayRef({2, 1, 28, 28}));
  EXPECT_EQ(inputs.min().item<float>(), -1);
  EXPECT_EQ(inputs[1][0][27][27].item<float>(), 1);
}

TEST(Dataset, a_missing_file_is_named) {
  const ScratchFolder folder;
  write_dataset(folder.path(), 3);
  std::filesystem::remove(folder / "t10k-labels-idx1-ubyte");
  EXPECT_THAT(error_loading(folder), HasSubstr((folder / "t10k-labels-idx1-ubyte").string()));
}

TEST(Dataset, other_image_sizes_are_an_error) {
  const ScratchFolder folder;
  write_dataset(folder.path(), 3);
  write_plain(folder / "train-images-idx3-ubyte", idx_bytes({3, 2, 2}, std::string(12, 'x')));
  EXPECT_THAT(error_loading(folder), HasSubstr("expected images of 28 x 28, got 2 x 2"));
}

TEST(Dataset, counts_that_differ_are_an_error) {
  const ScratchFolder folder;
  write_dataset(folder.path(), 3);
  write_plain(folder / "train-labels-idx1-ubyte", idx_bytes({2}, std::string(2, '\0')));
  EXPECT_THAT(error_loading(folder), HasSubstr("has 2 labels for 3 images"));
}

TEST(Dataset, labels_out_of_range_are_an_error) {
  const ScratchFolder folder;
  write_dataset(folder.path(), 3);
  write_plain(folder / "train-labels-idx1-ubyte", idx_bytes({3}, std::string("\0\x0a\1", 3)));
  EXPECT_THAT(error_loading(folder), HasSubstr("expected labels 0 to 9, got 10"));
}

TEST(Dataset, no_images_are_an_error) {
  const ScratchFolder folder;
  write_dataset(folder.path(), 0);
  EXPECT_THAT(error_loading(folder), HasSubstr("has no images"));
}

}  // namespace
}  // namespace demo
