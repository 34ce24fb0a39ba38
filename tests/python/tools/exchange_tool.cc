// The C++ side of test_checkpoint_exchange.py: writes and reads checkpoints of a fixed model.
//   exchange_tool write DTYPE QTYPE WEIGHTS INPUT CHECKPOINT OUTPUT
//   exchange_tool read DTYPE CHECKPOINT INPUT CHECKPOINT_AGAIN OUTPUT
// All are safetensors files; INPUT has a tensor "input", OUTPUT gets a tensor "output".
#include <quantal/quantal.h>
#include <quantal/safetensors.h>

#include <torch/torch.h>

#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

namespace q = quantal;
namespace files = quantal::safetensors;

// The twin of make_model() in test_checkpoint_exchange.py.
torch::nn::Sequential make_model() {
  using namespace torch::nn;
  return Sequential(Conv2d(Conv2dOptions(3, 16, 3).padding(1)), ReLU(),
                    Conv2d(Conv2dOptions(16, 32, 3).padding(1)), ReLU(),
                    Conv2d(Conv2dOptions(32, 8, 3)), Flatten(), Linear(128, 24), ReLU(),
                    Linear(LinearOptions(24, 320).bias(false)), ReLU(), Linear(320, 256), ReLU(),
                    Linear(256, 16));
}

at::ScalarType dtype_named(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  throw std::invalid_argument("dtype " + name);
}

void check(const q::Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

at::Tensor read_input(const std::string& path, at::ScalarType dtype) {
  auto reader = files::Reader::open(path);
  check(reader.status());
  const files::TensorInfo* info = reader.value().find("input");
  auto bytes = reader.value().data("input");
  check(bytes.status());
  const std::vector<std::int64_t> shape(info->shape.begin(), info->shape.end());
  auto* data = const_cast<std::byte*>(bytes.value().data.get());
  return torch::from_blob(data, shape, at::kFloat).to(dtype, /*non_blocking=*/false, /*copy=*/true);
}

void write_output(torch::nn::Sequential& model, const std::string& input, at::ScalarType dtype,
                  const std::string& path) {
  at::NoGradGuard no_grad;
  const at::Tensor output =
      q::dequantize(model->forward(read_input(input, dtype))).to(at::kFloat).contiguous();
  const files::TensorView view{"output",
                               files::Dtype::kF32,
                               {output.sizes().begin(), output.sizes().end()},
                               output.const_data_ptr(),
                               static_cast<std::uint64_t>(output.nbytes())};
  check(files::write(path, {&view, 1}));
}

int run(const std::vector<std::string>& words) {
  if (words.size() < 2) throw std::invalid_argument("no verb");
  const at::ScalarType dtype = dtype_named(words[1]);
  torch::nn::Sequential model = make_model();
  model->to(dtype);
  model->eval();
  if (words[0] == "write" && words.size() == 7) {
    q::load(model, words[3]);
    q::quantize(model, {.weights = q::find_qtype(words[2]).value()});
    q::freeze(model);
    q::save(model, words[5]);
    write_output(model, words[4], dtype, words[6]);
    return 0;
  }
  if (words[0] == "read" && words.size() == 6) {
    q::requantize(model, words[2]);
    q::save(model, words[4]);
    write_output(model, words[3], dtype, words[5]);
    return 0;
  }
  throw std::invalid_argument("expected the words that the head of this file names");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run({argv + 1, argv + argc});
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
  }
  return 1;
}
