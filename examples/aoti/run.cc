// Runs a quantized model that export.py compiled: libtorch and Quantal, no Python. Exits 0 where it
// computes what Python computed.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <quantal/qtensor.h>

namespace {

// What torch.save() wrote: the input, and the output that Python saw.
std::vector<at::Tensor> load_sample(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path.string());
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const c10::IValue saved = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> sample;
  for (const c10::IValue& value : saved.toListRef()) {
    sample.push_back(value.toTensor());
  }
  return sample;
}

double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

int fail(const std::string& message) {
  std::cerr << "quantal-aoti: error: " << message << std::endl;
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: quantal-aoti FOLDER (with model.pt2 and sample.pt, from export.py)\n";
    return 2;
  }
  try {
    const std::filesystem::path folder = argv[1];
    const std::vector<at::Tensor> sample = load_sample(folder / "sample.pt");
    torch::inductor::AOTIModelPackageLoader model((folder / "model.pt2").string());
    const c10::InferenceMode inference;
    const at::Tensor output = model.run({sample.at(0)}).at(0);
    // The package was compiled for any batch: a part of the sample must give a part of the output.
    const at::Tensor first = model.run({sample.at(0).narrow(0, 0, 1).contiguous()}).at(0);

    const double difference = std::max(largest_difference(output, sample.at(1)),
                                       largest_difference(first, sample.at(1).narrow(0, 0, 1)));
    std::cout << "largest difference from Python: " << difference
              << "; operations on dequantized values: " << quantal::fallback_count() << std::endl;
    return difference < 1e-4 ? 0 : 1;
  } catch (const c10::Error& error) {
    return fail(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return fail(error.what());
  }
}
