// Files that optimum-quanto writes: without Quantal's metadata.
#include <quantal/quantal.h>

#include <torch/torch.h>

#include <gmock/gmock.h>

#include "io/scratch.h"
#include "model/checkpoint_file_edit.h"
#include "model/checkpoint_models.h"

namespace quantal {
namespace {

using io::Scratch;
using testing::HasSubstr;

class ForeignCheckpoint : public testing::TestWithParam<QType> {};
INSTANTIATE_TEST_SUITE_P(All, ForeignCheckpoint, testing::ValuesIn(all_qtypes()),
                         [](const auto& info) { return std::string(info.param.name); });

// Turns a file of ours into what optimum-quanto writes.
EditableFile foreign_file(const QType& qtype, Net& net, Scratch& scratch) {
  quantize(net, {.weights = qtype, .include = {"conv", "fc1", "fc2"}});
  freeze(net);
  save(net, scratch.path("ours"));
  EditableFile file = EditableFile::read(scratch.path("ours"));
  file.metadata.clear();
  return file;
}

TEST_P(ForeignCheckpoint, files_without_metadata_are_read_by_their_keys) {
  Scratch scratch;
  Net net = make_net(), fresh = make_net(at::kFloat, 5);
  foreign_file(GetParam(), net, scratch).write(scratch.path());
  requantize(fresh, scratch.path());
  EXPECT_TRUE(at::equal(run(net), run(fresh)));
}

TEST_P(ForeignCheckpoint, files_are_read_with_the_map_beside_them) {
  Scratch scratch;
  Net net = make_net(), fresh = make_net(at::kFloat, 5);
  EditableFile file = foreign_file(GetParam(), net, scratch);
  file.set("fc1.input_scale", {}, {0.5});
  file.write(scratch.path());
  EXPECT_THAT(value_error_of([&] { requantize(fresh, scratch.path()); }),
              HasSubstr("fc1.input_scale"));
  const std::string types =
      R"({"weights":")" + std::string(GetParam().name) + R"(","activations":)";
  io::spit(scratch.path("quanto_qmap.json"), R"({"conv":)" + types + R"("none"},"fc1":)" + types +
                                                 R"("qint8"},"fc2":)" + types + R"("none"}})");
  requantize(fresh, scratch.path());
  EXPECT_EQ(quantization_map(fresh).at("fc1").activations, "qint8");
  for (const LayerReport& layer : report(fresh).layers) {
    EXPECT_EQ(layer.input_scale, layer.name == "fc1" ? std::optional(0.5) : std::nullopt);
  }
}

TEST(ForeignFile, a_map_that_contradicts_the_keys_is_an_error) {
  Scratch scratch;
  Net net = make_net(), fresh = make_net(at::kFloat, 5);
  foreign_file(qint8, net, scratch).write(scratch.path());
  io::spit(scratch.path("quanto_qmap.json"), R"({"fc1":{"weights":"qint4","activations":"none"}})");
  EXPECT_THAT(value_error_of([&] { requantize(fresh, scratch.path()); }),
              testing::AllOf(HasSubstr("fc1.weight"), HasSubstr("qint4")));
  io::spit(scratch.path("quanto_qmap.json"), R"({"fc7":{"weights":"qint8","activations":"none"}})");
  EXPECT_THAT(value_error_of([&] { requantize(fresh, scratch.path()); }), HasSubstr("fc7"));
}

TEST(ForeignFile, parts_that_do_not_tell_the_width_need_a_map) {
  Scratch scratch;
  torch::nn::Linear linear(8, 2), fresh(8, 2);
  quantize(linear, {.weights = qint4});
  freeze(linear);
  save(linear, scratch.path());
  EditableFile file = EditableFile::read(scratch.path());
  file.metadata.clear();
  file.write(scratch.path());
  EXPECT_THAT(value_error_of([&] { requantize(fresh, scratch.path()); }),
              HasSubstr("map is needed"));
  file.metadata["quantization_map"] = R"({"":{"weights":"qint4","activations":"none"}})";
  file.write(scratch.path());
  requantize(fresh, scratch.path());
  EXPECT_TRUE(at::equal(parts(linear->weight).data, parts(fresh->weight).data));
}

TEST(ForeignFile, shards_are_read_through_their_index) {
  Scratch scratch;
  Net net = make_net(), fresh = make_net(at::kFloat, 5);
  EditableFile rest = foreign_file(qint8, net, scratch), first;
  for (const char* key : {"fc1.weight._data", "conv.bias"}) {
    first.tensors.insert(rest.tensors.extract(key));
  }
  std::string map;
  for (const auto& [name, part] : {std::pair("a.safetensors", &first), {"b.safetensors", &rest}}) {
    part->write(scratch.path(name));
    for (const auto& [key, entry] : part->tensors) {
      map += (map.empty() ? "\"" : ",\"") + key + "\":\"" + name + "\"";
    }
  }
  io::spit(scratch.path("model.safetensors.index.json"), R"({"weight_map":{)" + map + "}}");
  requantize(fresh, scratch.path("model.safetensors.index.json"));
  EXPECT_TRUE(at::equal(run(net), run(fresh)));
}

}  // namespace
}  // namespace quantal
