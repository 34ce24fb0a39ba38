// The C++ side of test_checkpoint_exchange.py and test_script_exchange.py: writes and reads
// checkpoints of a fixed model, quantizes models that Python scripted or traced.
//   exchange_tool write DTYPE QTYPE WEIGHTS INPUT CHECKPOINT OUTPUT
//   exchange_tool read DTYPE CHECKPOINT INPUT CHECKPOINT_AGAIN OUTPUT
//   exchange_tool script MODEL INPUT WEIGHTS ACTIVATIONS eval|train OUTPUT
// MODEL is a TorchScript file, all others are safetensors files. INPUT has a tensor "input", OUTPUT
// gets "output", or for `script` one tensor of three runs a state of the model. `script` prints one
// line an operation that fell back.
#include <quantal/quantal.h>
#include <quantal/safetensors.h>

#include <torch/script.h>
#include <torch/torch.h>

#include <iostream>
#include <map>
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

void write_tensors(const std::string& path, const std::map<std::string, at::Tensor>& tensors) {
  std::vector<files::TensorView> views;
  std::vector<at::Tensor> kept;
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor floats = tensor.to(at::kFloat).contiguous();
    views.push_back({name,
                     files::Dtype::kF32,
                     {floats.sizes().begin(), floats.sizes().end()},
                     floats.const_data_ptr(),
                     static_cast<std::uint64_t>(floats.nbytes())});
    kept.push_back(floats);
  }
  check(files::write(path, views));
}

void write_output(torch::nn::Sequential& model, const std::string& input, at::ScalarType dtype,
                  const std::string& path) {
  at::NoGradGuard no_grad;
  write_tensors(path, {{"output", q::dequantize(model->forward(read_input(input, dtype)))}});
}

// Three runs, the later ones as the JIT's executor optimized them, with and without gradients.
void record(torch::jit::Module& model, const at::Tensor& input, const std::string& state,
            std::map<std::string, at::Tensor>& outputs) {
  for (const bool grad : {false, true}) {
    at::AutoGradMode mode(grad);
    std::vector<at::Tensor> runs;
    for (int i = 0; i < 3; ++i) {
      runs.push_back(q::dequantize(model.forward({input}).toTensor()).detach());
    }
    outputs[state + (grad ? "_grad" : "")] = at::stack(runs);
  }
}

void quantize_script(const std::vector<std::string>& words) {
  torch::jit::Module model = torch::jit::load(words[1]);
  const at::Tensor input = read_input(words[2], at::kFloat);
  model.train(words[5] == "train");
  std::map<std::string, at::Tensor> outputs;
  record(model, input, "float", outputs);
  q::QuantizeOptions options{.weights = q::find_qtype(words[3])};
  options.activations = q::find_qtype(words[4]);
  q::quantize(model, options);
  record(model, input, "live", outputs);
  if (options.activations) {
    {
      q::Calibration calibration(model);
      record(model, input, "calibrating", outputs);
    }
    record(model, input, "live", outputs);
  }
  q::reset_fallback_counts();
  q::freeze(model);
  record(model, input, "frozen", outputs);
  for (const auto& [op, count] : q::fallback_counts()) std::cout << op << " " << count << "\n";
  write_tensors(words[6], outputs);
}

int run(const std::vector<std::string>& words) {
  if (words.size() < 2) throw std::invalid_argument("no verb");
  if (words[0] == "script" && words.size() == 7) {
    quantize_script(words);
    return 0;
  }
  const at::ScalarType dtype = dtype_named(words[1]);
  torch::nn::Sequential model = make_model();
  model->to(dtype);
  model->eval();
  if (words[0] == "write" && words.size() == 7) {
    q::load(model, words[3]);
    q::quantize(model, {.weights = q::find_qtype(words[2])});
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
