#include <algorithm>
#include <cstring>
#include <random>

#include <gmock/gmock.h>

#include "io/scratch.h"

namespace quantal::io {
namespace {

using safetensors::Dtype;
using safetensors::Metadata;
using safetensors::Reader;
using safetensors::TensorInfo;
using safetensors::TensorView;
using testing::HasSubstr;

// One tensor of every dtype, of a size that leaves later ones misaligned unless they are sorted.
struct AllDtypes {
  AllDtypes() {
    std::mt19937 random(7);
    for (int i = 0; i < safetensors::kNumDtypes; ++i) {
      const Dtype dtype = static_cast<Dtype>(i);
      const std::size_t size = 24u * static_cast<std::size_t>(safetensors::dtype_bits(dtype)) / 8;
      std::string& bytes = data.emplace_back(size, '\0');
      const unsigned mask = dtype == Dtype::kBool ? 1 : 0xFF;
      for (char& c : bytes) c = static_cast<char>(random() & mask);
    }
    for (int i = 0; i < safetensors::kNumDtypes; ++i) {
      const Dtype dtype = static_cast<Dtype>(i);
      const std::string& bytes = data[static_cast<std::size_t>(i)];
      tensors.push_back({.name = safetensors::dtype_name(dtype),
                         .dtype = dtype,
                         .shape = {2, 3, 4},
                         .data = bytes.data(),
                         .size = bytes.size()});
    }
  }
  std::vector<std::string> data;
  std::vector<TensorView> tensors;
};

const Metadata kMetadata = {{"format", "pt"}, {"", ""}, {"k\"\\\n\x01", "\xF0\x9F\x98\x80"}};

std::size_t data_begin(const std::string& bytes) {
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof(length));
  return 8 + length;
}

TEST(Writer, all_dtypes_come_back) {
  Scratch scratch;
  const AllDtypes all;
  ASSERT_OK(safetensors::write(scratch.path(), all.tensors, kMetadata));
  const Result<Reader> reader = Reader::open(scratch.path(), {.strict = true});
  ASSERT_OK(reader.status());
  EXPECT_EQ(reader.value().metadata(), kMetadata);
  EXPECT_EQ(reader.value().tensors().size(), all.tensors.size());
  for (const TensorView& tensor : all.tensors) {
    const TensorInfo* info = reader.value().find(tensor.name);
    ASSERT_NE(info, nullptr);
    EXPECT_EQ(info->dtype, tensor.dtype);
    EXPECT_EQ(info->shape, tensor.shape);
    EXPECT_EQ(to_string(reader.value().data(*info).value()),
              std::string(static_cast<const char*>(tensor.data), tensor.size));
  }
}

TEST(Writer, data_is_aligned) {
  Scratch scratch;
  const AllDtypes all;
  for (std::size_t count = 0; count <= all.tensors.size(); ++count) {
    ASSERT_OK(safetensors::write(scratch.path(), std::span(all.tensors).first(count)));
    const std::string bytes = slurp(scratch.path());
    EXPECT_EQ(data_begin(bytes) % 64, 0u);
    EXPECT_EQ(bytes[8], '{');
    const Result<Reader> reader = Reader::open(scratch.path());
    ASSERT_OK(reader.status());
    for (const TensorInfo& info : reader.value().tensors()) {
      const int bytes_each = std::max(1, safetensors::dtype_bits(info.dtype) / 8);
      EXPECT_EQ(info.begin % static_cast<std::uint64_t>(bytes_each), 0u) << info.name;
    }
  }
}

TEST(Writer, the_order_of_tensors_does_not_matter) {
  Scratch scratch;
  AllDtypes all;
  ASSERT_OK(safetensors::write(scratch.path("a"), all.tensors, kMetadata));
  std::mt19937 random(3);
  for (int i = 0; i < 10; ++i) {
    std::shuffle(all.tensors.begin(), all.tensors.end(), random);
    ASSERT_OK(safetensors::write(scratch.path("b"), all.tensors, kMetadata));
    EXPECT_EQ(slurp(scratch.path("a")), slurp(scratch.path("b")));
  }
}

TEST(Writer, a_loaded_file_saves_to_the_same_bytes) {
  Scratch scratch;
  const AllDtypes all;
  ASSERT_OK(safetensors::write(scratch.path("a"), all.tensors, kMetadata));
  const Result<Reader> reader = Reader::open(scratch.path("a"));
  ASSERT_OK(reader.status());
  std::vector<TensorView> tensors;
  std::vector<safetensors::Bytes> alive;
  for (const TensorInfo& info : reader.value().tensors()) {
    alive.push_back(reader.value().data(info).value());
    tensors.push_back({info.name, info.dtype, info.shape, alive.back().data.get(), info.size()});
  }
  ASSERT_OK(safetensors::write(scratch.path("b"), tensors, reader.value().metadata()));
  EXPECT_EQ(slurp(scratch.path("a")), slurp(scratch.path("b")));
}

TEST(Writer, the_bytes_are_these) {
  Scratch scratch;
  const std::string a = "xy", b = "\1\2\3\4";
  ASSERT_OK(safetensors::write(
      scratch.path(),
      std::vector<TensorView>{bytes_tensor("a", a),
                              {.name = "b", .dtype = Dtype::kF32, .data = b.data(), .size = 4}},
      {{"format", "pt"}}));
  std::string json = R"({"__metadata__":{"format":"pt"},)"
                     R"("b":{"dtype":"F32","shape":[],"data_offsets":[0,4]},)"
                     R"("a":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}})";
  ASSERT_LE(json.size(), 184u);
  json.resize(184, ' ');
  EXPECT_EQ(slurp(scratch.path()), "\xB8" + std::string(7, '\0') + json + b + a);
}

TEST(Writer, odd_names_and_empty_tensors_come_back) {
  Scratch scratch;
  const std::string none, one = "x";
  std::vector<TensorView> tensors;
  for (const std::string& name :
       {std::string(), std::string("a\0b", 3), std::string("../x"), std::string("\"\\/\n\x1F"),
        std::string("\xC3\xA9"), std::string(4096, 'n')}) {
    tensors.push_back(bytes_tensor(name, tensors.size() % 2 ? one : none));
  }
  ASSERT_OK(safetensors::write(scratch.path(), tensors));
  const Result<Reader> reader = Reader::open(scratch.path());
  ASSERT_OK(reader.status());
  for (const TensorView& tensor : tensors) {
    const TensorInfo* info = reader.value().find(tensor.name);
    ASSERT_NE(info, nullptr) << tensor.name;
    EXPECT_EQ(info->size(), tensor.size);
  }
}

class WriterRefuses : public testing::Test {
 protected:
  void expect(Errc code, std::vector<TensorView> tensors, const Metadata& metadata = {},
              const std::string& message = "") {
    spit(scratch_.path(), "old");
    const Status status = safetensors::write(scratch_.path(), tensors, metadata);
    EXPECT_STREQ(errc_name(status.code()), errc_name(code)) << status.message();
    EXPECT_THAT(status.message(), HasSubstr(message));
    EXPECT_EQ(slurp(scratch_.path()), "old");
    EXPECT_EQ(scratch_.names().size(), 1u);
  }

  const std::string data_ = std::string(8, '\1');
  const TensorView good_ = bytes_tensor("t", data_);
  Scratch scratch_;
};

TEST_F(WriterRefuses, names) {
  expect(Errc::kDuplicateKey, {good_, bytes_tensor("u", data_), good_}, {}, "tensor 't'");
  expect(Errc::kInvalidArgument, {bytes_tensor("__metadata__", data_)});
  expect(Errc::kInvalidUtf8, {bytes_tensor("\xFF", data_)});
  expect(Errc::kInvalidUtf8, {bytes_tensor("\xED\xA0\x80", data_)});
  expect(Errc::kLimitExceeded, {bytes_tensor(std::string(4097, 'n'), data_)});
}

TEST_F(WriterRefuses, metadata) {
  expect(Errc::kInvalidUtf8, {good_}, {{"\xFF", "v"}});
  expect(Errc::kInvalidUtf8, {good_}, {{"k", "\xC0\x80"}});
}

TEST_F(WriterRefuses, shapes_and_sizes) {
  const auto with = [&](Dtype dtype, std::vector<std::uint64_t> shape, std::uint64_t size) {
    return std::vector<TensorView>{{"t", dtype, std::move(shape), data_.data(), size}};
  };
  expect(Errc::kSizeMismatch, with(Dtype::kU8, {7}, 8), {}, "7 bytes ([7] of U8)");
  expect(Errc::kSizeMismatch, with(Dtype::kF32, {3}, 8));
  expect(Errc::kSizeMismatch, with(Dtype::kF4, {3}, 2), {}, "whole bytes");
  expect(Errc::kInvalidShape, with(Dtype::kU8, std::vector<std::uint64_t>(65, 1), 1));
  expect(Errc::kInvalidShape, with(Dtype::kU8, {~0ull}, 8));
  expect(Errc::kInvalidShape, with(Dtype::kU8, {1ull << 32, 1ull << 32, 0}, 0));
  expect(Errc::kUnsupportedDtype, with(static_cast<Dtype>(200), {8}, 8));
  expect(Errc::kInvalidArgument, {{"t", Dtype::kU8, {8}, nullptr, 8}});
}

TEST_F(WriterRefuses, bool_values) {
  const std::string bytes = "\1\2";
  expect(Errc::kInvalidData, {{"t", Dtype::kBool, {2}, bytes.data(), 2}}, {}, "offset 1");
}

TEST_F(WriterRefuses, a_header_over_the_limit) {
  expect(Errc::kHeaderTooLarge, {good_}, {{"k", std::string(100'000'000, 'v')}});
}

}  // namespace
}  // namespace quantal::io
