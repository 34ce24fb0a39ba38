#include "tensor/fallback.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>

#include "tensor/autograd.h"
#include "tensor/dispatch_log.h"
#include "tensor/qtensor_impl.h"

namespace quantal {
namespace {

using torch::jit::Stack;

bool is_write(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

bool returns_view(const c10::FunctionSchema& schema) {
  for (const c10::Argument& result : schema.returns()) {
    if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) return true;
  }
  return false;
}

// Calls `replace(tensor, is_written)` for every quantized tensor among an operation's arguments,
// lists included, and puts the result in its place.
template <typename Replace>
void replace_arguments(const c10::FunctionSchema& schema, Stack& stack, const Replace& replace) {
  const size_t first = stack.size() - schema.arguments().size();
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    c10::IValue& value = stack[first + i];
    const bool written = is_write(schema.arguments()[i]);
    if (value.isTensor()) {
      if (is_qtensor(value.toTensor())) value = replace(value.toTensor(), written);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) {
        list.push_back(is_qtensor(t) ? replace(t, written) : t);
      }
      value = std::move(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector()) {
        list.push_back(t && is_qtensor(*t) ? std::optional(replace(*t, written)) : t);
      }
      value = std::move(list);
    }
  }
}

// Runs `op` over plain arguments; views of normal tensors are normal tensors.
void call(const c10::OperatorHandle& op, Stack* stack, const at::Tensor& viewed) {
  std::optional<ViewGuard> guard;
  if (viewed.defined()) guard.emplace(viewed);
  op.callBoxed(stack);
}

// A returned argument is the very tensor that the caller gave.
void restore_returned_arguments(const c10::FunctionSchema& schema, const Stack& originals,
                                Stack& stack) {
  const size_t first = stack.size() - schema.returns().size();
  for (size_t r = 0; r < schema.returns().size(); ++r) {
    const auto* returned = schema.returns()[r].alias_info();
    if (returned == nullptr || !returned->isWrite()) continue;
    for (size_t i = 0; i < originals.size(); ++i) {
      const auto* given = schema.arguments()[i].alias_info();
      if (given != nullptr && *given == *returned && originals[i].isTensor()) {
        stack[first + r] = originals[i];
      }
    }
  }
}

// How an operation without an own kernel takes its quantized arguments.
struct Reading {
  bool quantized;  // of live weights the quantized value, not the latent
  bool counted;
};

// Operators of other libraries compute with the weights that they take, and their backward calls
// aten's compute operations. Those that move parameters between processes must see the latent.
bool reads_quantized(const c10::OperatorHandle& op) {
  const std::string& name = op.operator_name().name;
  for (const char* reads_float : {"aten::", "prim", "c10d", "_c10d", "fsdp::", "symm_mem::"}) {
    if (name.starts_with(reads_float)) return false;
  }
  return true;
}

// What one call of the fallback did to its quantized arguments.
class Substitution {
 public:
  Substitution(const c10::OperatorHandle& op, Reading reading)
      : op_(op), reading_(reading), makes_view_(returns_view(op.schema())) {}

  at::Tensor operator()(const at::Tensor& t, bool written) {
    if (makes_view_ && !viewed_.defined()) viewed_ = t;
    std::optional<ViewGuard> guard;
    if (makes_view_ || written) guard.emplace(t);
    if (written) return writable(t);
    return is_weight(t) ? readable_weight(t) : readable_activation(t);
  }

  const at::Tensor& viewed() const { return viewed_; }

  void log() const {
    if (logged_ && reading_.counted) log_fallback(op_.operator_name(), weight_);
  }

  // Moves versions and takes over shapes that the operation changed in place.
  void finish_writes() const {
    for (const auto& [target, plain, geometry] : writes_) {
      QTensorImpl* impl = impl_of(target);
      if (impl->weight) {
        TORCH_CHECK(Geometry::of(plain) == geometry &&
                        plain.storage().is_alias_of(impl->weight->latent().storage()),
                    "[quantal] ", op_.operator_name(),
                    " cannot change the shape or storage of a live weight in place");
        impl->weight->latent().unsafeGetTensorImpl()->bump_version();
        continue;
      }
      if (!plain.storage().is_alias_of(impl->activation->value.storage())) {
        impl->activation = std::make_shared<ActivationCell>();
        impl->activation->value = flat_storage(plain);
      }
      impl->set_geometry(Geometry::of(plain));
    }
  }

 private:
  struct Write {
    at::Tensor target;
    at::Tensor plain;
    Geometry geometry;
  };

  at::Tensor writable(const at::Tensor& t) {
    QTensorImpl* impl = impl_of(t);
    at::Tensor plain;
    if (impl->weight) {
      TORCH_CHECK(impl->weight->live(), "[quantal] ", op_.operator_name(),
                  " cannot write to a frozen weight of shape ", t.sizes(),
                  ": use copy_(), or write before freeze()");
      plain = float_value(t);
    } else {
      logged_ = logged_ || impl->activation->codes.defined();
      materialize(t);
      plain = Geometry::of(t).view_of(impl->activation->value);
    }
    writes_.push_back({t, plain, Geometry::of(plain)});
    return plain;
  }

  at::Tensor readable_weight(const at::Tensor& t) {
    const WeightCell& cell = *impl_of(t)->weight;
    if (!cell.live() || (reading_.quantized && cell.scheme())) {
      logged_ = true;
      weight_ = t;
    } else if (at::GradMode::is_enabled() && cell.scheme()) {
      logged_ = true;  // a forward pass that sees the latent would train unquantized
    }
    return reading_.quantized ? quantized_value(t) : float_value(t);
  }

  at::Tensor readable_activation(const at::Tensor& t) {
    logged_ = logged_ || impl_of(t)->activation->codes.defined();
    // Writes through a float view of codes would be lost: base and view share floats instead.
    if (makes_view_) {
      materialize(t);
      return Geometry::of(t).view_of(impl_of(t)->activation->value);
    }
    return quantized_value(t);
  }

  const c10::OperatorHandle& op_;
  const Reading reading_;
  const bool makes_view_;
  bool logged_ = false;
  at::Tensor weight_;
  at::Tensor viewed_;
  std::vector<Write> writes_;
};

void run_on_floats(const c10::OperatorHandle& op, Stack* stack, Reading reading) {
  const c10::FunctionSchema& schema = op.schema();
  const Stack originals(stack->end() - static_cast<std::ptrdiff_t>(schema.arguments().size()),
                        stack->end());
  Substitution substitution(op, reading);
  replace_arguments(schema, *stack, std::ref(substitution));
  substitution.log();
  call(op, stack, substitution.viewed());
  substitution.finish_writes();
  restore_returned_arguments(schema, originals, *stack);
}

// The elements that a quantized tensor shows, as positions: what view operations rearrange.
at::Tensor positions(const at::Tensor& t) {
  const Geometry geometry = Geometry::of(t);
  const auto options = at::TensorOptions().dtype(t.scalar_type()).device(at::kMeta);
  return geometry.view_of(at::empty({geometry.extent()}, options));
}

std::atomic<bool> operators_changed{false};

struct Listener final : c10::OpRegistrationListener {
  void onOperatorRegistered(const c10::OperatorHandle&) override { operators_changed = true; }
  void onOperatorDeregistered(const c10::OperatorHandle&) override {}
};

bool needs_cover(const c10::OperatorHandle& op) {
  using c10::DispatchKey;
  if (!op.hasSchema() || op.hasKernelForDispatchKey(DispatchKey::PrivateUse3)) return false;
  return op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd) ||
         op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutogradNonFunctional);
}

}  // namespace

void fallback_kernel(const c10::OperatorHandle& op, Stack* stack) {
  run_on_floats(op, stack, {.quantized = reads_quantized(op), .counted = true});
}

void compute_kernel(const c10::OperatorHandle& op, Stack* stack) {
  run_on_floats(op, stack, {.quantized = true, .counted = false});
}

void sparse_kernel(const c10::OperatorHandle& op, Stack* stack) {
  run_on_floats(op, stack, {.quantized = true, .counted = true});
}

void uncounted_kernel(const c10::OperatorHandle& op, Stack* stack) {
  run_on_floats(op, stack, {.quantized = false, .counted = false});
}

void compute_autograd_kernel(const c10::OperatorHandle& op, Stack* stack) {
  replace_arguments(op.schema(), *stack,
                    [](const at::Tensor& t, bool) { return dequantize_ste(t); });
  op.callBoxed(stack);
}

void factory_kernel(const c10::OperatorHandle& op, Stack* stack) {
  replace_arguments(op.schema(), *stack, [](const at::Tensor& t, bool) {
    return at::empty_strided(t.sizes(), t.strides(), t.options());
  });
  op.callBoxed(stack);
}

void view_kernel(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const at::Tensor base = (*stack)[stack->size() - count].toTensor();
  Stack geometry_call(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
  {
    c10::InferenceMode normal(false);
    at::AutoDispatchBelowADInplaceOrView below;
    geometry_call.front() = positions(base);
    op.callBoxed(geometry_call);
  }
  c10::List<at::Tensor> aliases;
  const c10::IValue& result = geometry_call.front();
  const bool is_list = result.isTensorList();
  for (const at::Tensor& shown :
       is_list ? result.toTensorVector() : std::vector{result.toTensor()}) {
    auto alias = make_alias(base, Geometry::of(shown));
    if (!alias) return fallback_kernel(op, stack);
    aliases.push_back(*std::move(alias));
  }
  torch::jit::drop(*stack, count);
  if (is_list) {
    stack->emplace_back(std::move(aliases));
  } else {
    stack->emplace_back(aliases.get(0));
  }
}

std::int64_t cover_operators() {
  static std::mutex mutex;
  static auto* covered = new std::int64_t(0);
  static auto* libraries = new std::vector<std::unique_ptr<torch::Library>>;
  std::lock_guard lock(mutex);
  operators_changed = false;
  auto& dispatcher = c10::Dispatcher::singleton();
  static auto* listener = new c10::RegistrationHandleRAII(
      dispatcher.addRegistrationListener(std::make_unique<Listener>()));
  (void)listener;
  std::map<std::string, std::vector<std::string>> by_namespace;
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    if (!op || !needs_cover(*op)) continue;
    const size_t colon = name.name.find("::");
    const std::string space = name.name.substr(0, colon);
    if (space == "prim" || space == "prims" || space == "quantal") continue;
    const std::string overload = name.overload_name.empty() ? "" : "." + name.overload_name;
    by_namespace[space].push_back(name.name.substr(colon + 2) + overload);
  }
  for (const auto& [space, names] : by_namespace) {
    auto library = std::make_unique<torch::Library>(
        torch::Library::IMPL, space, c10::DispatchKey::PrivateUse3, __FILE__, __LINE__);
    for (const std::string& name : names) {
      library->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback_kernel>());
    }
    *covered += static_cast<std::int64_t>(names.size());
    libraries->push_back(std::move(library));
  }
  operators_changed = false;
  return *covered;
}

void cover_new_operators() {
  if (operators_changed) cover_operators();
}

}  // namespace quantal
