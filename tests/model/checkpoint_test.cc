#include <quantal/quantal.h>

#include <torch/torch.h>

#include <filesystem>
#include <functional>

#include <gmock/gmock.h>

#include "io/scratch.h"
#include "model/checkpoint_file_edit.h"
#include "model/checkpoint_models.h"

namespace quantal {
namespace {

using io::Scratch;
using io::slurp;
using testing::HasSubstr;

// The names, kinds and values of a model's tensors, as text that two models can be compared by.
std::string fingerprint(torch::nn::Module& module) {
  std::ostringstream text;
  for (const auto& item : module.named_parameters()) {
    const at::Tensor value = quantal::dequantize(item.value()).detach().to(at::kDouble);
    text << item.key() << is_quantized(item.value()) << is_live(item.value()) << value.sum()
         << value.abs().sum() << "\n";
  }
  for (const auto& item : module.named_buffers()) text << item.key() << item.value().sum() << "\n";
  return text.str();
}

class EveryQType : public testing::TestWithParam<QType> {};
INSTANTIATE_TEST_SUITE_P(Checkpoint, EveryQType, testing::ValuesIn(all_qtypes()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(EveryQType, a_reloaded_model_computes_the_same_bits) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble}) {
    Scratch scratch;
    Net net = make_net(dtype);
    quantize(net, {.weights = GetParam()});
    freeze(net);
    save(net, scratch.path());
    Net fresh = make_net(dtype, 5);
    requantize(fresh, scratch.path());
    EXPECT_TRUE(is_frozen(fresh->conv->weight));
    EXPECT_TRUE(is_frozen(fresh->fc1->weight));
    EXPECT_TRUE(at::equal(run(net, dtype), run(fresh, dtype))) << dtype;
    EXPECT_EQ(quantization_map(net), quantization_map(fresh));
  }
}

TEST_P(EveryQType, the_same_model_gives_the_same_bytes) {
  Scratch scratch;
  Net net = make_net();
  quantize(net, {.weights = GetParam(), .activations = qint8});
  {
    Calibration calibration(net, {.momentum = 0.5});
    run(net);
  }
  freeze(net);
  save(net, scratch.path("a"));
  save(net, scratch.path("b"));
  EXPECT_EQ(slurp(scratch.path("a")), slurp(scratch.path("b")));
  Net fresh = make_net(at::kFloat, 5);
  requantize(fresh, scratch.path("a"));
  save(fresh, scratch.path("c"));
  EXPECT_EQ(slurp(scratch.path("a")), slurp(scratch.path("c")));
}

TEST_P(EveryQType, unfrozen_weights_stay_trainable) {
  Scratch scratch;
  Net net = make_net();
  quantize(net, {.weights = GetParam()});
  save(net, scratch.path());
  Net fresh = make_net(at::kFloat, 5);
  requantize(fresh, scratch.path());
  ASSERT_TRUE(is_live(fresh->fc1->weight));
  EXPECT_TRUE(fresh->fc1->weight.requires_grad());
  EXPECT_TRUE(at::equal(latent(net->fc1->weight), latent(fresh->fc1->weight)));
  EXPECT_TRUE(at::equal(run(net), run(fresh)));
  freeze(net);
  freeze(fresh);
  EXPECT_TRUE(at::equal(run(net), run(fresh)));
}

TEST_P(EveryQType, the_file_has_the_keys_of_optimum_quanto) {
  Scratch scratch;
  Net net = make_net();
  quantize(net, {.weights = GetParam(), .include = {"fc1", "fc2"}});
  freeze(net);
  save(net, scratch.path());
  const EditableFile file = EditableFile::read(scratch.path());
  std::vector<std::string> keys;
  for (const auto& [key, entry] : file.tensors) {
    if (key.starts_with("fc")) keys.push_back(key);
  }
  const std::vector<std::string> packed = {"fc1.bias",
                                           "fc1.input_scale",
                                           "fc1.output_scale",
                                           "fc1.weight._data._data",
                                           "fc1.weight._scale",
                                           "fc1.weight._shift",
                                           "fc2.input_scale",
                                           "fc2.output_scale",
                                           "fc2.weight._data._data",
                                           "fc2.weight._scale",
                                           "fc2.weight._shift"};
  const std::vector<std::string> bytes = {
      "fc1.bias",         "fc1.input_scale",   "fc1.output_scale",
      "fc1.weight._data", "fc1.weight._scale", "fc2.input_scale",
      "fc2.output_scale", "fc2.weight._data",  "fc2.weight._scale"};
  EXPECT_EQ(keys, GetParam().is_affine() ? packed : bytes);
  EXPECT_THAT(
      file.metadata.at("quantization_map"),
      HasSubstr(R"("fc1":{"activations":"none","weights":")" + std::string(GetParam().name)));
}

TEST(Checkpoint, group_sizes_come_back) {
  Scratch scratch;
  Net net = make_net();
  quantize(net,
           {.weights = qint4, .include = {"fc1"}, .group_size = 48, .allow_short_group = true});
  freeze(net);
  save(net, scratch.path());
  Net fresh = make_net(at::kFloat, 5);
  requantize(fresh, scratch.path());
  EXPECT_EQ(parts(fresh->fc1->weight).group_size, 48);
  EXPECT_TRUE(at::equal(run(net), run(fresh)));
}

TEST(Checkpoint, calibrated_scales_and_decisions_come_back) {
  for (const bool streamline : {true, false}) {
    Scratch scratch;
    Net net = make_net();
    quantize(net, {.weights = qint8, .activations = qint8});
    {
      Calibration calibration(net, {.streamline = streamline});
      run(net);
    }
    freeze(net);
    save(net, scratch.path());
    Net fresh = make_net(at::kFloat, 5);
    requantize(fresh, scratch.path());
    EXPECT_TRUE(at::equal(run(net), run(fresh)));
    const Report before = report(net), after = report(fresh);
    ASSERT_EQ(before.layers.size(), after.layers.size());
    for (size_t i = 0; i < before.layers.size(); ++i) {
      EXPECT_EQ(before.layers[i].input_scale, after.layers[i].input_scale);
      EXPECT_EQ(before.layers[i].output_scale, after.layers[i].output_scale);
      EXPECT_EQ(before.layers[i].quantizes_output, after.layers[i].quantizes_output);
      EXPECT_EQ(before.layers[i].snr_db, after.layers[i].snr_db);
    }
  }
}

TEST(Checkpoint, what_was_not_calibrated_stays_so) {
  Scratch scratch;
  Net net = make_net();
  quantize(net, {.weights = qint8, .activations = qint8});
  freeze(net);
  save(net, scratch.path());
  Net fresh = make_net(at::kFloat, 5);
  requantize(fresh, scratch.path());
  for (const LayerReport& layer : report(fresh).layers) EXPECT_FALSE(layer.input_scale);
  EXPECT_TRUE(at::equal(run(net), run(fresh)));
}

TEST(Checkpoint, a_calibrated_scale_of_one_is_one) {
  Scratch scratch;
  torch::nn::Linear linear(4, 4), fresh(4, 4);
  quantize(linear, {.weights = qint8, .activations = qint8});
  {
    Calibration calibration(linear);
    linear(torch::full({1, 4}, 127.0));
  }
  save(linear, scratch.path());
  requantize(fresh, scratch.path());
  EXPECT_EQ(report(fresh).layers.at(0).input_scale, 1.0);
}

TEST(Checkpoint, a_file_can_be_saved_over_while_its_weights_are_in_use) {
  Scratch scratch;
  Net net = make_net();
  quantize(net, {.weights = qint4});
  freeze(net);
  save(net, scratch.path());
  const std::string bytes = slurp(scratch.path());
  Net fresh = make_net(at::kFloat, 5);
  requantize(fresh, scratch.path());
  save(fresh, scratch.path());
  EXPECT_EQ(slurp(scratch.path()), bytes);
  EXPECT_TRUE(at::equal(run(net), run(fresh)));
}

// What is wrong with a file, and what the error must name.
struct Damage {
  const char* name;
  std::function<void(EditableFile&)> apply;
  std::vector<std::string> wanted;
};

const std::vector<Damage>& damages() {
  using File = EditableFile;
  static const std::vector<Damage> all = {
      {"missing_bias", [](File& f) { f.tensors.erase("fc1.bias"); }, {"fc1.bias", "got none"}},
      {"missing_data", [](File& f) { f.tensors.erase("fc1.weight._data"); }, {"fc1.weight._data"}},
      {"missing_scale",
       [](File& f) { f.tensors.erase("fc2.weight._scale"); },
       {"fc2.weight._scale"}},
      {"missing_buffer",
       [](File& f) { f.tensors.erase("norm.running_var"); },
       {"norm.running_var"}},
      {"missing_calibrated_scale",
       [](File& f) { f.tensors.erase("fc1.input_scale"); },
       {"fc1.input_scale"}},
      {"extra_tensor",
       [](File& f) { f.set("fc9.weight", {1}, {1}); },
       {"no place", "'fc9.weight'"}},
      {"float_beside_codes", [](File& f) { f.set("fc1.weight", {1}, {1}); }, {"'fc1.weight'"}},
      {"misshaped_bias",
       [](File& f) { f.set("fc1.bias", {2}, {1, 2}); },
       {"fc1.bias", "[2]", "[24]"}},
      {"misshaped_data",
       [](File& f) { f.tensors["fc1.weight._data"].shape = {320, 24}; },
       {"fc1.weight", "[320, 24]", "[24, 320]"}},
      {"wrong_dtype_of_data",
       [](File& f) { f.tensors["fc1.weight._data"].dtype = safetensors::Dtype::kU8; },
       {"fc1.weight"}},
      {"wrong_dtype_of_bias",
       [](File& f) { f.tensors["fc1.bias"].dtype = safetensors::Dtype::kI32; },
       {"fc1.bias", "Int", "Float"}},
      {"zero_scale",
       [](File& f) { f.set("fc2.weight._scale", {5, 1}, {1, 1, 0, 1, 1}); },
       {"fc2.weight", "scale", "positive"}},
      {"negative_scale",
       [](File& f) { f.set("fc2.weight._scale", {5, 1}, {1, 1, -1, 1, 1}); },
       {"fc2.weight", "scale", "positive"}},
      {"nan_scale",
       [](File& f) { f.set("fc2.weight._scale", {5, 1}, {1, 1, NAN, 1, 1}); },
       {"fc2.weight", "scale", "finite"}},
      {"infinite_input_scale",
       [](File& f) { f.set("fc1.input_scale", {}, {INFINITY}); },
       {"fc1.input_scale", "finite"}},
      {"newer_version",
       [](File& f) { f.metadata["quantal.format_version"] = "2"; },
       {"version 1", "'2'"}},
      {"broken_json",
       [](File& f) { f.metadata["quantal.weights"] = "{\"a\":"; },
       {"quantal.weights"}},
      {"deep_json",
       [](File& f) {
         f.metadata["quantal.weights"] = std::string(100, '[') + std::string(100, ']');
       },
       {"quantal.weights", "deep"}},
      {"json_of_another_form", [](File& f) { f.metadata["quantal.weights"] = "[]"; }, {"object"}},
      {"record_without_fields",
       [](File& f) { f.metadata["quantal.weights"] = R"({"fc1.weight":{}})"; },
       {"fc1.weight", "'weights'"}},
      {"negative_group_size",
       [](File& f) {
         std::string& text = f.metadata["quantal.weights"];
         text.replace(text.find("\"group_size\":0"), 14, "\"group_size\":-1");
       },
       {"group_size", "non-negative"}},
      {"unknown_qtype",
       [](File& f) {
         std::string& text = f.metadata["quantal.weights"];
         text.replace(text.find("\"weights\":\"qint8\""), 17, "\"weights\":\"qint7\"");
       },
       {"qint7"}},
      {"unknown_layer",
       [](File& f) {
         std::string& text = f.metadata["quantal.weights"];
         text.replace(text.find("\"fc1.weight\""), 12, "\"fc7.weight\"");
       },
       {"'fc7.weight'"}},
      {"missing_aliases",
       [](File& f) { f.metadata.erase("quantal.aliases"); },
       {"quantal.aliases"}},
  };
  return all;
}

class DamagedCheckpoint : public testing::TestWithParam<Damage> {};
INSTANTIATE_TEST_SUITE_P(Checkpoint, DamagedCheckpoint, testing::ValuesIn(damages()),
                         [](const auto& info) { return info.param.name; });

TEST_P(DamagedCheckpoint, is_refused_and_leaves_the_model_as_it_was) {
  Scratch scratch;
  Net net = make_net();
  quantize(net, {.weights = qint8, .activations = qint8});
  {
    Calibration calibration(net);
    run(net);
  }
  freeze(net);
  save(net, scratch.path());
  EditableFile file = EditableFile::read(scratch.path());
  GetParam().apply(file);
  file.write(scratch.path("damaged"));

  Net fresh = make_net(at::kFloat, 5);
  const std::string before = fingerprint(*fresh);
  const std::string error = value_error_of([&] { requantize(fresh, scratch.path("damaged")); });
  for (const std::string& wanted : GetParam().wanted) EXPECT_THAT(error, HasSubstr(wanted));
  EXPECT_EQ(fingerprint(*fresh), before);

  // Nor does it harm a model that is quantized already.
  const std::string quantized = fingerprint(*net);
  EXPECT_NE(value_error_of([&] { load(net, scratch.path("damaged")); }), "no ValueError");
  EXPECT_EQ(fingerprint(*net), quantized);
}

TEST(Checkpoint, a_model_of_another_dtype_is_refused) {
  Scratch scratch;
  Net net = make_net();
  quantize(net, {.weights = qint8});
  freeze(net);
  save(net, scratch.path());
  Net fresh = make_net(at::kBFloat16, 5);
  EXPECT_THAT(value_error_of([&] { requantize(fresh, scratch.path()); }),
              testing::AllOf(HasSubstr("F32"), HasSubstr("BF16")));
}

TEST(Checkpoint, a_model_without_memory_is_refused) {
  Scratch scratch;
  torch::nn::Linear linear(4, 4), meta(4, 4);
  save(linear, scratch.path());
  meta->weight = Parameters::of(*meta)["weight"] = torch::empty({4, 4}, torch::kMeta);
  EXPECT_THAT(value_error_of([&] { load(meta, scratch.path()); }), HasSubstr("meta"));
}

TEST(Checkpoint, a_missing_file_is_an_error_with_its_name) {
  torch::nn::Linear linear(4, 4);
  EXPECT_THROW(load(linear, "/nonexistent/model.safetensors"), c10::Error);
}

TEST(Checkpoint, load_wants_the_same_form) {
  Scratch scratch;
  Net net = make_net();
  quantize(net, {.weights = qint8});
  freeze(net);
  save(net, scratch.path());

  Net plain = make_net(at::kFloat, 5);
  EXPECT_THAT(value_error_of([&] { load(plain, scratch.path()); }), HasSubstr("requantize()"));
  Net other = make_net(at::kFloat, 5);
  quantize(other, {.weights = qint4});
  EXPECT_THAT(value_error_of([&] { load(other, scratch.path()); }), HasSubstr("another way"));
  Net same = make_net(at::kFloat, 5);
  quantize(same, {.weights = qint8});
  load(same, scratch.path());
  EXPECT_TRUE(is_frozen(same->fc1->weight));
  EXPECT_TRUE(at::equal(run(net), run(same)));
}

TEST(Checkpoint, unfrozen_weights_load_into_the_tensors_that_an_optimizer_holds) {
  Scratch scratch;
  Net net = make_net(), same = make_net(at::kFloat, 5);
  quantize(net, {.weights = qint8});
  quantize(same, {.weights = qint8});
  save(net, scratch.path());
  const at::Tensor held = same->fc1->weight;
  load(same, scratch.path());
  EXPECT_TRUE(held.is_same(same->fc1->weight));
  EXPECT_TRUE(at::equal(run(net), run(same)));
  freeze(same);
  EXPECT_THAT(value_error_of([&] { load(same, scratch.path()); }), HasSubstr("not frozen"));
}

TEST(Checkpoint, float_models_can_be_saved_too) {
  Scratch scratch;
  Net net = make_net(), fresh = make_net(at::kFloat, 5);
  save(net, scratch.path());
  load(fresh, scratch.path());
  EXPECT_TRUE(at::equal(run(net), run(fresh)));
}

struct TiedImpl : torch::nn::Module {
  explicit TiedImpl(bool tie) {
    embedding = register_module("embedding", torch::nn::Embedding(50, 16));
    head = register_module("head", torch::nn::Linear(torch::nn::LinearOptions(16, 50).bias(false)));
    if (!tie) return;
    head->weight = embedding->weight;
    Parameters::of(*head)["weight"] = embedding->weight;
  }
  torch::Tensor forward(torch::Tensor ids) { return head(embedding(ids)); }
  torch::nn::Embedding embedding{nullptr};
  torch::nn::Linear head{nullptr};
};
TORCH_MODULE(Tied);

TEST(Checkpoint, shared_weights_are_stored_once_and_stay_shared) {
  for (const bool frozen : {true, false}) {
    Scratch scratch;
    Tied model(true);
    quantize(model, {.weights = qint8});
    if (frozen) freeze(model);
    save(model, scratch.path());
    const EditableFile file = EditableFile::read(scratch.path());
    EXPECT_TRUE(file.tensors.contains(frozen ? "embedding.weight._data" : "embedding.weight"));
    EXPECT_FALSE(file.tensors.contains(frozen ? "head.weight._data" : "head.weight"));
    const at::Tensor ids = torch::arange(50);
    for (const bool tie : {true, false}) {
      Tied fresh(tie);
      requantize(fresh, scratch.path());
      EXPECT_TRUE(fresh->head->weight.is_same(fresh->embedding->weight)) << frozen << tie;
      EXPECT_TRUE(at::equal(model->forward(ids), fresh->forward(ids)));
    }
  }
}

TEST(Checkpoint, shared_weights_keep_the_scales_of_the_layer_that_has_them) {
  for (const bool frozen : {true, false}) {
    Scratch scratch;
    Tied model(true);
    const at::Tensor ids = torch::arange(50);
    quantize(model, {.weights = qint8, .activations = qint8});
    {
      Calibration calibration(model);
      model->forward(ids);
    }
    if (frozen) freeze(model);
    save(model, scratch.path());
    for (const bool tie : {true, false}) {
      Tied fresh(tie);
      requantize(fresh, scratch.path());
      EXPECT_TRUE(at::equal(quantal::dequantize(model->forward(ids)),
                            quantal::dequantize(fresh->forward(ids))));
      save(fresh, scratch.path("again"));
      EXPECT_EQ(slurp(scratch.path()), slurp(scratch.path("again")));
    }
  }
}

TEST(Checkpoint, an_optimizer_made_before_is_noticed) {
  Scratch scratch;
  Net net = make_net();
  quantize(net, {.weights = qint8});
  save(net, scratch.path());
  Net fresh = make_net(at::kFloat, 5);
  torch::optim::SGD optimizer(fresh->parameters(), 0.1);
  EXPECT_THAT(value_error_of([&] { requantize(fresh, scratch.path()); }), HasSubstr("optimizer"));
  EXPECT_FALSE(is_quantized(fresh->fc1->weight));
  freeze(net);
  save(net, scratch.path());
  requantize(fresh, scratch.path());
}

TEST(Checkpoint, a_tie_that_the_file_contradicts_is_an_error) {
  Scratch scratch;
  Tied apart(false), tied(true);
  save(apart, scratch.path());
  EXPECT_THAT(value_error_of([&] { load(tied, scratch.path()); }),
              testing::AllOf(HasSubstr("embedding.weight"), HasSubstr("head.weight")));
}

}  // namespace
}  // namespace quantal
