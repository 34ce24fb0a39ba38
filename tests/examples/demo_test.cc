// Runs the demo program: once on a part of the data, and on inputs that it must refuse.
#include <sys/wait.h>

#include <cstdio>

#include <torch/torch.h>

#include <gmock/gmock.h>

#include <quantal/quantal.h>
#include <array>
#include <nlohmann/json.hpp>

#include "dataset.h"
#include "net.h"
#include "results.h"
#include "scratch_folder.h"
#include "table.h"
#include "train.h"

namespace demo {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

const std::vector<std::string> kSchemes = {"float", "int8", "int8-int8", "int8-int8-qat",
                                           "int4",  "int2", "float8"};
constexpr const char* kData = "/usr/share/datasets/fashion-mnist";

struct Finished {
  int code = -1;
  std::string output;  ///< stdout and stderr
};

Finished run_demo(const std::string& arguments) {
  FILE* pipe = popen(  // NOLINT(bugprone-command-processor): the arguments are the tests' own
      (std::string(QUANTAL_DEMO) + " " + arguments + " 2>&1").c_str(), "r");
  Finished run;
  std::array<char, 4096> buffer{};
  while (const size_t got = fread(buffer.data(), 1, buffer.size(), pipe)) {
    run.output.append(buffer.data(), got);
  }
  const int status = pclose(pipe);
  if (WIFEXITED(status)) run.code = WEXITSTATUS(status);
  return run;
}

std::map<std::string, Result> read_results(const std::filesystem::path& path) {
  std::map<std::string, Result> results;
  for (const auto& entry : nlohmann::json::parse(std::ifstream(path))) {
    EXPECT_EQ(entry.size(), 4u);
    const Result result{entry.at("scheme"), entry.at("accuracy"), entry.at("file_bytes"),
                        entry.at("ms_per_batch")};
    results[result.scheme] = result;
  }
  return results;
}

void expect_sane(const std::map<std::string, Result>& results,
                 const std::filesystem::path& folder) {
  EXPECT_EQ(results.size(), kSchemes.size());
  for (const std::string& scheme : kSchemes) {
    SCOPED_TRACE(scheme);
    ASSERT_TRUE(results.contains(scheme));
    const Result& result = results.at(scheme);
    EXPECT_GT(result.accuracy, scheme == "int2" ? 30 : 70);
    EXPECT_LE(result.accuracy, 100);
    EXPECT_EQ(result.file_bytes, std::filesystem::file_size(folder / (scheme + ".safetensors")));
    EXPECT_GT(result.ms_per_batch, 0);
    EXPECT_LT(result.ms_per_batch, 10'000);
  }
  const Result& plain = results.at("float");
  EXPECT_NEAR(results.at("int8-int8").accuracy, plain.accuracy, 1);
  EXPECT_NEAR(results.at("int8").accuracy, plain.accuracy, 1);
  EXPECT_NEAR(results.at("float8").accuracy, plain.accuracy, 1);
  const auto ratio = [&](const char* scheme) {
    return static_cast<double>(results.at(scheme).file_bytes) / plain.file_bytes;
  };
  EXPECT_LT(ratio("int8"), 0.26);
  EXPECT_LT(ratio("int8-int8"), 0.26);
  EXPECT_LT(ratio("float8"), 0.26);
  EXPECT_LT(ratio("int4"), 0.16);
  EXPECT_LT(ratio("int2"), 0.10);
}

torch::Tensor logits_of_file(const std::filesystem::path& path, const Samples& samples) {
  Net net;
  quantal::requantize(net, path);
  return predict(net, samples, path.filename());
}

// The files of a run give the outputs of models quantized here, and the accuracies of its results.
void expect_files_hold_the_models(const std::map<std::string, Result>& results,
                                  const std::filesystem::path& folder, const Samples& samples) {
  for (const std::string& scheme : kSchemes) {
    SCOPED_TRACE(scheme);
    const torch::Tensor logits = logits_of_file(folder / (scheme + ".safetensors"), samples);
    EXPECT_DOUBLE_EQ(accuracy(logits, samples.labels), results.at(scheme).accuracy);
  }
  for (const auto& [scheme, qtype] : {std::pair{"int8", quantal::qint8},
                                      {"int4", quantal::qint4},
                                      {"int2", quantal::qint2},
                                      {"float8", quantal::qfloat8}}) {
    SCOPED_TRACE(scheme);
    Net net;
    quantal::requantize(net, folder / "float.safetensors");
    quantal::quantize(net, {.weights = qtype});
    quantal::freeze(net);
    EXPECT_TRUE(
        torch::equal(logits_of_file(folder / (std::string(scheme) + ".safetensors"), samples),
                     predict(net, samples, scheme)));
  }
}

void expect_png(const std::filesystem::path& path) {
  std::string head(24, '\0');
  ASSERT_TRUE(std::ifstream(path, std::ios::binary).read(head.data(), 24)) << path;
  EXPECT_EQ(head.substr(0, 8), "\x89PNG\r\n\x1a\n");
  EXPECT_GT(std::filesystem::file_size(path), 20'000u);
}

TEST(Demo, a_reduced_run_writes_models_results_and_plot) {
  const ScratchFolder folder;
  const std::filesystem::path out = folder / "made" / "here";
  const Finished run = run_demo(
      "--limit 3000 --epochs 1 --batch-size 32 --seed 1 --threads 1 --out " + out.string());
  ASSERT_EQ(run.code, 0) << run.output;
  for (const char* text :
       {"Fashion-MNIST", "not calibrated", "ACCURACY %", "FILE BYTES", "qint8 static", "float8"}) {
    EXPECT_THAT(run.output, HasSubstr(text));
  }
  const auto results = read_results(out / "results.json");
  expect_sane(results, out);
  expect_files_hold_the_models(results, out, load_dataset(kData, 3000).test);
  expect_png(out / "results.png");
}

TEST(Demo, help_names_every_option) {
  const Finished run = run_demo("--help");
  EXPECT_EQ(run.code, 0);
  for (const char* option :
       {"--data", "--out", "--epochs", "--batch-size", "--limit", "--seed", "--threads", kData}) {
    EXPECT_THAT(run.output, HasSubstr(option));
  }
}

void expect_refused(const std::string& arguments, const std::string& message) {
  const Finished run = run_demo(arguments);
  EXPECT_EQ(run.code, 1) << run.output;
  EXPECT_THAT(run.output, AllOf(HasSubstr(message), Not(HasSubstr("frame #"))));
  EXPECT_LT(run.output.size(), 500u) << run.output;
}

TEST(Demo, refuses_a_missing_data_folder) {
  const ScratchFolder folder;
  expect_refused("--data /no/such/folder --out " + folder.path().string(),
                 "error: /no/such/folder: no such folder");
}

TEST(Demo, refuses_a_folder_without_the_files) {
  const ScratchFolder folder;
  expect_refused("--data " + folder.path().string() + " --out " + (folder / "out").string(),
                 "error: " + (folder / "train-images-idx3-ubyte").string() + ": no such file");
}

TEST(Demo, refuses_a_truncated_file) {
  const ScratchFolder folder;
  write_dataset(folder.path(), 3);
  std::filesystem::resize_file(folder / "t10k-images-idx3-ubyte", 1000);
  expect_refused("--data " + folder.path().string() + " --out " + (folder / "out").string(),
                 "error: " + (folder / "t10k-images-idx3-ubyte").string() + ": truncated");
}

TEST(Demo, refuses_a_wrong_magic_number) {
  const ScratchFolder folder;
  write_dataset(folder.path(), 3);
  write_plain(folder / "train-labels-idx1-ubyte", "PK\3\4 something else");
  expect_refused(
      "--data " + folder.path().string() + " --out " + (folder / "out").string(),
      "error: " + (folder / "train-labels-idx1-ubyte").string() + ": wrong magic number");
}

TEST(Demo, refuses_an_out_folder_that_cannot_be_made_or_written) {
  const ScratchFolder folder;
  write_plain(folder / "file", "");
  expect_refused("--out " + (folder / "file").string(), "error: " + (folder / "file").string());
  expect_refused("--out " + (folder / "file" / "below").string(),
                 "error: " + (folder / "file" / "below").string());
  expect_refused("--out /proc", "error: /proc");
}

TEST(Demo, refuses_options_out_of_range) {
  expect_refused("--epochs 0", "--epochs");
  expect_refused("--limit -1", "--limit");
  expect_refused("--batch-size many", "--batch-size");
  expect_refused("--surprise", "--surprise");
}

TEST(Table, shows_every_result_beside_float) {
  const std::string text = table({{"float", 90, 1000, 4}, {"int8", 89.5, 250, 5}});
  EXPECT_THAT(text, testing::MatchesRegex(
                        "SCHEME +ACCURACY % +VS FLOAT +FILE BYTES +VS FLOAT +MS/BATCH +VS FLOAT\n"
                        "float +90.00 +.0.00 +1000 +x 1.00 +4.00 +x 1.00\n"
                        "int8 +89.50 +-0.50 +250 +x 0.25 +5.00 +x 1.25\n*"));
}

TEST(Accuracy, is_the_percentage_of_labels_with_the_largest_output) {
  const torch::Tensor logits = torch::tensor({{1.f, 2.f}, {4.f, 3.f}, {5.f, 6.f}, {8.f, 7.f}});
  EXPECT_DOUBLE_EQ(accuracy(logits, torch::tensor({1, 0, 0, 0})), 75);
}

}  // namespace
}  // namespace demo
