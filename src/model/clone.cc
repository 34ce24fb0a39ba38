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

 private:
  std::vector<ModuleEntry> modules_;
};

at::Tensor cloned_weight(const at::Tensor& weight) {
  at::NoGradGuard no_grad;
  at::Tensor copy = weight.clone().detach();
  return copy.set_requires_grad(weight.requires_grad());
}

// Puts clones of the source's quantized weights, and its ties, into a copy of the same structure.
// Ties of plain tensors are left to the module's own clone() where their handles are not known.
void copy_weights(const std::vector<ModuleEntry>& source, const std::vector<ModuleEntry>& copies) {
  TORCH_CHECK(copies.size() == source.size(),
              "[quantal::clone] the copy has another structure than the module");
  std::map<const c10::TensorImpl*, at::Tensor> clones;
  for (size_t m = 0; m < source.size(); ++m) {
    TORCH_CHECK(
        copies[m].name == source[m].name && copies[m].slots.size() == source[m].slots.size(),
        "[quantal::clone] the copy of '", source[m].name, "' has another structure");
    for (size_t s = 0; s < source[m].slots.size(); ++s) {
      const Slot& slot = source[m].slots[s];
      const Slot& copy = copies[m].slots[s];
      if (slot.is_buffer || (!is_qtensor(slot.tensor) && !copy.replace_member)) continue;
      at::Tensor& clone = clones[slot.tensor.unsafeGetTensorImpl()];
      if (!clone.defined()) {
        const bool is_copied = !is_qtensor(slot.tensor) && slot.registered;
        clone = is_copied ? copy.tensor : cloned_weight(slot.tensor);
      }
      (slot.registered ? copy.replace : copy.replace_member)(clone);
    }
  }
}

}  // namespace

std::shared_ptr<torch::nn::Module> clone(torch::nn::Module& module) {
  const std::vector<ModuleEntry> source = nn_modules(module, /*every_name=*/true);
  std::shared_ptr<torch::nn::Module> copy;
  {
    PlainWeights plain(module);
    copy = module.clone();
  }
  copy_weights(source, nn_modules(*copy, /*every_name=*/true));
  return copy;
}

torch::jit::Module clone(torch::jit::Module& module) {
  const std::vector<ModuleEntry> source = script_modules(module);
  torch::jit::Module copy = [&] {
    PlainWeights plain(module);
    return module.deepcopy();
  }();
  copy_weights(source, script_modules(copy));
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
