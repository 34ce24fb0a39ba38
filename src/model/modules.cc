#include "model/modules.h"

namespace quantal {
namespace {

const std::vector<ModuleType>& module_types() {
  static const std::vector<ModuleType> types = {
      {"Linear", ModuleKind::kCompute, {"weight"}},
      {"NonDynamicallyQuantizableLinear", ModuleKind::kCompute, {"weight"}},
      {"Conv1d", ModuleKind::kCompute, {"weight"}},
      {"Conv2d", ModuleKind::kCompute, {"weight"}},
      {"Conv3d", ModuleKind::kCompute, {"weight"}},
      {"ConvTranspose1d", ModuleKind::kCompute, {"weight"}},
      {"ConvTranspose2d", ModuleKind::kCompute, {"weight"}},
      {"ConvTranspose3d", ModuleKind::kCompute, {"weight"}},
      {"MultiheadAttention",
       ModuleKind::kCompute,
       {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"},
       "in_proj_bias"},
      {"Bilinear", ModuleKind::kWeighted, {"weight"}},
      {"Embedding", ModuleKind::kWeighted, {"weight"}},
      {"EmbeddingBag", ModuleKind::kWeighted, {"weight"}},
      {"LSTM", ModuleKind::kWeighted, {"weight_*"}},
      {"GRU", ModuleKind::kWeighted, {"weight_*"}},
      {"RNN", ModuleKind::kWeighted, {"weight_*"}},
      {"LSTMCell", ModuleKind::kWeighted, {"weight_*"}},
      {"GRUCell", ModuleKind::kWeighted, {"weight_*"}},
      {"RNNCell", ModuleKind::kWeighted, {"weight_*"}},
      {"LayerNorm", ModuleKind::kNormalizing, {"weight"}},
  };
  return types;
}

}  // namespace

const ModuleType* find_module_type(const std::string& name) {
  for (const ModuleType& type : module_types()) {
    if (type.name == name) return &type;
  }
  return nullptr;
}

bool is_quantizable_parameter(const ModuleType& type, const std::string& parameter) {
  for (const std::string& weight : type.weights) {
    const bool matches = weight.back() == '*'
                             ? parameter.starts_with(weight.substr(0, weight.size() - 1))
                             : parameter == weight;
    if (matches) return true;
  }
  return false;
}

std::vector<ModuleEntry> modules_of(const Model& model) {
  return model.nn_module() != nullptr ? nn_modules(*model.nn_module())
                                      : script_modules(*model.script_module());
}

}  // namespace quantal
