#include <quantal/model.h>

#include <torch/script.h>
#include <torch/torch.h>

#include <map>

#include "model/layers.h"

namespace quantal {
namespace {

// While it lives, a model's quantized weights are replaced by plain tensors of the same shape, so
// that code that reads storage can run.
class PlainWeights {
 public:
  explicit PlainWeights(const Model& model) : modules_(modules_of(model)) {
    for (const ModuleEntry& entry : modules_) {
      for (const Slot& slot : entry.slots) {
        if (!is_qtensor(slot.tensor)) continue;
        const at::Tensor& t = slot.tensor;
        at::Tensor plain =
            at::zeros({1}, at::dtype(t.scalar_type()).device(t.device())).expand(t.sizes());
        slot.replace(plain.set_requires_grad(t.requires_grad()));
      }
    }
  }
  ~PlainWeights() {
    for (const ModuleEntry& entry : modules_) {
      for (const Slot& slot : entry.slots) {
        if (is_qtensor(slot.tensor)) slot.replace(slot.tensor);
      }
    }
  }
  PlainWeights(const PlainWeights&) = delete;
  PlainWeights& operator=(const PlainWeights&) = delete;

  const std::vector<ModuleEntry>& modules() const { return modules_; }

 private:
  std::vector<ModuleEntry> modules_;
};

at::Tensor cloned_weight(const at::Tensor& weight) {
  at::NoGradGuard no_grad;
  at::Tensor copy = weight.clone().detach();
  return copy.set_requires_grad(weight.requires_grad());
}

// Puts clones of the source's quantized weights, and its ties, into a copy of the same structure.
void copy_weights(const std::vector<ModuleEntry>& source, const Model& target) {
  const std::vector<ModuleEntry> copies = modules_of(target);
  TORCH_CHECK(copies.size() == source.size(),
              "[quantal::clone] the copy has another structure than the module");
  std::map<const c10::TensorImpl*, at::Tensor> clones;
  for (size_t m = 0; m < source.size(); ++m) {
    TORCH_CHECK(copies[m].name == source[m].name && copies[m].slots.size() == source[m].slots.size(),
                "[quantal::clone] the copy of '", source[m].name, "' has another structure");
    for (size_t s = 0; s < source[m].slots.size(); ++s) {
      const at::Tensor& tensor = source[m].slots[s].tensor;
      const Slot& copy = copies[m].slots[s];
      if (copy.is_buffer) continue;
      at::Tensor& clone = clones[tensor.unsafeGetTensorImpl()];
      if (clone.defined()) {
        copy.replace(clone);
        continue;
      }
      clone = is_qtensor(tensor) ? cloned_weight(tensor) : copy.tensor;
      if (is_qtensor(tensor)) copy.replace(clone);
    }
  }
}

}  // namespace

std::shared_ptr<torch::nn::Module> clone(torch::nn::Module& module) {
  PlainWeights plain(module);
  std::shared_ptr<torch::nn::Module> copy = module.clone();
  copy_weights(plain.modules(), *copy);
  return copy;
}

torch::jit::Module clone(torch::jit::Module& module) {
  PlainWeights plain(module);
  torch::jit::Module copy = module.deepcopy();
  copy_weights(plain.modules(), copy);
  return copy;
}

void to(const Model& model, c10::Device device) {
  TORCH_CHECK_VALUE(device.type() != c10::DeviceType::Meta,
                    "[quantal::to] a quantized model cannot be moved to the meta device");
  if (model.nn_module() != nullptr) return model.nn_module()->to(device);
  model.script_module()->to(device);
}

void to(const Model& model, c10::ScalarType dtype) {
  if (model.nn_module() != nullptr) return model.nn_module()->to(dtype);
  model.script_module()->to(dtype);
}

}  // namespace quantal
