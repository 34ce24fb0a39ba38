#include <gmock/gmock.h>

#include "io/scratch.h"

namespace quantal::io {
namespace {

using safetensors::Shard;
using safetensors::ShardIndex;
using safetensors::TensorView;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Pair;

class Shards : public testing::Test {
 protected:
  void shard(const std::string& name, const std::vector<std::string>& tensors) {
    std::vector<TensorView> views;
    for (const std::string& tensor : tensors) views.push_back(bytes_tensor(tensor, data_));
    ASSERT_OK(safetensors::write(scratch_.path(name), views));
  }
  Result<ShardIndex> read(const std::string& json) {
    spit(index_, json);
    return safetensors::read_shard_index(index_);
  }
  Status open(const std::string& json) {
    spit(index_, json);
    return safetensors::open_shards(index_).status();
  }

  const std::string data_ = "abc";
  Scratch scratch_;
  const std::string index_ = scratch_.path("model.safetensors.index.json");
};

TEST_F(Shards, an_index_is_read) {
  const auto index =
      read(R"({"metadata":{"total_size":3.0,"x":[{}]},"weight_map":{"b":"2","a":"1"}})");
  ASSERT_OK(index.status());
  EXPECT_THAT(index.value().weight_map, ElementsAre(Pair("a", "1"), Pair("b", "2")));
}

TEST_F(Shards, shard_names_stay_in_the_folder) {
  for (const std::string& name :
       {std::string(), std::string("."), std::string(".."), std::string("../../etc/x"),
        std::string("/etc/passwd"), std::string("a/b"), std::string("a\\b"), std::string("a/"),
        std::string("a\0b", 3), std::string(256, 'n')}) {
    EXPECT_EQ(safetensors::verify_shard_name(name).code(), Errc::kPathEscape) << name;
  }
  for (const char* name : {"model-00001-of-00002.safetensors", "..a", "a b", "\xC3\xA9"}) {
    EXPECT_TRUE(safetensors::verify_shard_name(name).ok()) << name;
  }
  const Status status = read(R"({"weight_map":{"w":"../../etc/x"}})").status();
  EXPECT_EQ(status.code(), Errc::kPathEscape);
  EXPECT_THAT(status.message(), HasSubstr("'../../etc/x', for tensor 'w'"));
  EXPECT_EQ(read(R"({"weight_map":{"w":"a\u0000b"}})").status().code(), Errc::kPathEscape);
}

TEST_F(Shards, malformed_indices_are_errors) {
  const auto code = [&](const std::string& json) { return read(json).status().code(); };
  EXPECT_EQ(code(""), Errc::kInvalidJson);
  EXPECT_EQ(code("[]"), Errc::kInvalidJson);
  EXPECT_EQ(code("1"), Errc::kInvalidJson);
  EXPECT_EQ(code("{}"), Errc::kInvalidJson);
  EXPECT_EQ(code(R"({"metadata":{}})"), Errc::kInvalidJson);
  EXPECT_EQ(code(R"({"weight_map":[]})"), Errc::kInvalidJson);
  EXPECT_EQ(code(R"({"weight_map":null})"), Errc::kInvalidJson);
  EXPECT_EQ(code(R"({"weight_map":{"a":1}})"), Errc::kInvalidJson);
  EXPECT_EQ(code(R"({"weight_map":{"a":["1"]}})"), Errc::kInvalidJson);
  EXPECT_EQ(code(R"({"weight_map":{"a":"1"}} x)"), Errc::kInvalidJson);
  EXPECT_EQ(code(R"({"weight_map":{"a":"1","a":"2"}})"), Errc::kDuplicateKey);
  EXPECT_EQ(code(R"({"weight_map":{"a":"1"},"weight_map":{}})"), Errc::kDuplicateKey);
  EXPECT_EQ(code(R"({"metadata":{"k":1,"k":2},"weight_map":{}})"), Errc::kDuplicateKey);
  EXPECT_EQ(code(R"({"weight_map":{},"x":)" + std::string(100'000, '[')), Errc::kDepthExceeded);
  EXPECT_EQ(code("{\"\xFF\":0}"), Errc::kInvalidUtf8);
  EXPECT_EQ(safetensors::read_shard_index(scratch_.path("none")).status().code(), Errc::kIo);
  EXPECT_EQ(safetensors::read_shard_index(scratch_.folder()).status().code(), Errc::kIo);
}

TEST_F(Shards, an_index_over_the_limit_is_not_read) {
  spit(index_, "{}");
  std::filesystem::resize_file(index_, (64u << 20) + 1);
  EXPECT_EQ(safetensors::read_shard_index(index_).status().code(), Errc::kLimitExceeded);
}

TEST_F(Shards, all_shards_open) {
  shard("s1", {"a", "b"});
  shard("s2", {"c"});
  spit(index_, R"({"weight_map":{"a":"s1","b":"s1","c":"s2"}})");
  const Result<std::vector<Shard>> shards = safetensors::open_shards(index_);
  ASSERT_OK(shards.status());
  ASSERT_EQ(shards.value().size(), 2u);
  EXPECT_EQ(shards.value()[0].name, "s1");
  EXPECT_EQ(to_string(shards.value()[1].reader.data("c").value()), "abc");
}

TEST_F(Shards, an_index_that_disagrees_with_its_shards_is_an_error) {
  shard("s1", {"a", "b"});
  shard("s2", {"c"});
  shard("s3", {"a"});
  const auto expect = [&](const std::string& map, Errc code, const std::string& message) {
    const Status status = open("{\"weight_map\":" + map + "}");
    EXPECT_STREQ(errc_name(status.code()), errc_name(code)) << status.message();
    EXPECT_THAT(status.message(), HasSubstr(message));
  };
  expect(R"({"a":"s1","b":"s1","c":"gone"})", Errc::kIo, "gone");
  expect(R"({"a":"s1","b":"s1","c":"s2","d":"s2"})", Errc::kMissingTensor, "tensor 'd'");
  expect(R"({"a":"s1","b":"s2","c":"s2"})", Errc::kMissingTensor, "tensor 'b'");
  expect(R"({"a":"s1","c":"s2"})", Errc::kOrphanTensor, "tensor 'b'");
  expect(R"({"a":"s3","b":"s1","c":"s2"})", Errc::kDuplicateKey, "tensor 'a'");
  spit(scratch_.path("s2"), "broken");
  expect(R"({"a":"s1","b":"s1","c":"s2"})", Errc::kHeaderTooSmall, "s2");
}

}  // namespace
}  // namespace quantal::io
