#include "idx.h"

#include <gmock/gmock.h>

#include <random>

#include "scratch_folder.h"

namespace demo {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

const std::string kSix = {1, 2, 3, 4, 5, static_cast<char>(255)};

std::string error_reading(const std::filesystem::path& path, int dims) {
  return error_of([&] { read_idx(path, dims); });
}

TEST(Idx, reads_shape_and_elements_of_a_plain_file) {
  const ScratchFolder folder;
  write_plain(folder / "a", idx_bytes({1, 2, 3}, kSix));
  const Idx idx = read_idx(folder / "a", 3);
  EXPECT_THAT(idx.shape, ElementsAre(1, 2, 3));
  EXPECT_THAT(idx.bytes, ElementsAre(1, 2, 3, 4, 5, 255));
}

TEST(Idx, reads_a_gzipped_file_of_several_chunks_as_the_plain_one) {
  const ScratchFolder folder;
  std::mt19937 random(1);
  std::string elements;
  for (int i = 0; i < (5 << 19) + 3; ++i) elements += static_cast<char>(random() & 0xff);
  const std::string bytes = idx_bytes({static_cast<std::uint32_t>(elements.size())}, elements);
  write_plain(folder / "a", bytes);
  write_gzipped(folder / "a.gz", bytes);
  const std::vector<std::uint8_t> expected(elements.begin(), elements.end());
  EXPECT_EQ(read_idx(folder / "a", 1).bytes, expected);
  EXPECT_EQ(read_idx(folder / "a.gz", 1).bytes, expected);
}

TEST(Idx, reads_a_file_without_elements) {
  const ScratchFolder folder;
  write_plain(folder / "a", idx_bytes({0, 28, 28}, ""));
  EXPECT_THAT(read_idx(folder / "a", 3).shape, ElementsAre(0, 28, 28));
}

TEST(Idx, every_truncation_is_an_error_that_names_the_file) {
  const ScratchFolder folder;
  const std::string bytes = idx_bytes({2, 3}, kSix);
  for (size_t size = 0; size < bytes.size(); ++size) {
    write_plain(folder / "short", bytes.substr(0, size));
    EXPECT_THAT(error_reading(folder / "short", 2),
                AllOf(HasSubstr((folder / "short").string()), HasSubstr("truncated")))
        << size << " bytes";
  }
}

TEST(Idx, a_truncated_gzip_file_is_an_error) {
  const ScratchFolder folder;
  write_gzipped(folder / "a.gz", idx_bytes({6}, kSix));
  const auto size = std::filesystem::file_size(folder / "a.gz");
  for (std::uintmax_t cut = 1; cut <= 12; ++cut) {
    std::filesystem::resize_file(folder / "a.gz", size - cut);
    EXPECT_THAT(error_reading(folder / "a.gz", 1),
                AllOf(HasSubstr((folder / "a.gz").string()), HasSubstr("truncated")))
        << cut << " bytes less";
  }
}

TEST(Idx, a_flipped_bit_in_gzip_data_is_an_error) {
  const ScratchFolder folder;
  std::string elements(1000, '\0');
  for (size_t i = 0; i < elements.size(); ++i) elements[i] = static_cast<char>(i * i % 251);
  write_gzipped(folder / "a.gz", idx_bytes({1000}, elements));
  const auto middle = static_cast<std::streamoff>(std::filesystem::file_size(folder / "a.gz") / 2);
  std::fstream file(folder / "a.gz", std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(middle);
  const int byte = file.get();
  file.seekp(middle);
  file.put(static_cast<char>(byte ^ 0x10));
  file.close();
  EXPECT_THAT(error_reading(folder / "a.gz", 1), HasSubstr((folder / "a.gz").string()));
}

TEST(Idx, wrong_magic_numbers_are_errors_that_show_them) {
  const ScratchFolder folder;
  write_plain(folder / "png", "\x89PNG\r\n\x1a\n0000");
  EXPECT_THAT(error_reading(folder / "png", 3),
              HasSubstr("png: wrong magic number: expected 00000803, got 89504e47"));
  write_plain(folder / "labels", idx_bytes({6}, kSix));
  EXPECT_THAT(error_reading(folder / "labels", 3), HasSubstr("expected 00000803, got 00000801"));
}

TEST(Idx, bytes_behind_the_elements_are_an_error) {
  const ScratchFolder folder;
  write_plain(folder / "long", idx_bytes({5}, kSix));
  EXPECT_THAT(error_reading(folder / "long", 1), HasSubstr("longer than the 5 elements"));
}

TEST(Idx, a_header_that_asks_for_too_much_is_an_error_without_allocating_it) {
  const ScratchFolder folder;
  write_plain(folder / "huge", idx_bytes({0xffffffff, 0xffffffff, 0xffffffff}, kSix));
  EXPECT_THAT(error_reading(folder / "huge", 3), HasSubstr("over 4 GiB"));
  write_plain(folder / "large", idx_bytes({0xffffffff}, kSix));
  EXPECT_THAT(error_reading(folder / "large", 1), HasSubstr("truncated"));
}

TEST(Idx, missing_files_and_folders_are_errors) {
  const ScratchFolder folder;
  EXPECT_THAT(error_reading(folder / "none", 1), HasSubstr("No such file"));
  EXPECT_THAT(error_reading(folder.path(), 1), HasSubstr(folder.path().string()));
}

TEST(FindIdx, takes_the_plain_file_else_the_gzipped_one) {
  const ScratchFolder folder;
  EXPECT_THAT(error_of([&] { find_idx(folder.path(), "a"); }),
              HasSubstr((folder / "a").string() + ": no such file, nor with .gz"));
  write_plain(folder / "a.gz", "");
  EXPECT_EQ(find_idx(folder.path(), "a"), folder / "a.gz");
  write_plain(folder / "a", "");
  EXPECT_EQ(find_idx(folder.path(), "a"), folder / "a");
}

}  // namespace
}  // namespace demo
