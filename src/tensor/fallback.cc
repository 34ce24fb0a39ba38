#include "tensor/fallback.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <functional>
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

// Runs `op` over plain arguments; views of normal tensors are normal tensors. Writes to a view of a
// weight move the version of the tensor that was viewed: its cell looks there.
void call(const c10::OperatorHandle& op, Stack* stack, const at::Tensor& viewed) {
  std::optional<ViewGuard> guard;
  if (viewed.defined()) guard.emplace(viewed);
  op.callBoxed(stack);
  if (!viewed.defined() || !is_weight(viewed)) return;
  const c10::VariableVersion& counter = impl_of(viewed)->version_counter();
  impl_of(viewed)->weight->watch(counter);
  if (!counter.enabled()) return;
  for (const c10::IValue& result : torch::jit::last(*stack, op.schema().returns().size())) {
    if (result.isTensor()) result.toTensor().unsafeGetTensorImpl()->set_version_counter(counter);
    if (!result.isTensorList()) continue;
    for (const at::Tensor& t : result.toTensorVector()) {
      t.unsafeGetTensorImpl()->set_version_counter(counter);
    }
  }
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

// Operators of other libraries compute with the weights that they take. Those that move parameters
// between processes must see the latent.
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
      plain = latent_of(t);
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
    } else if (records_gradients_ && cell.scheme()) {
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
  const bool records_gradients_ = at::GradMode::is_enabled();  // ViewGuard changes it
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

// A plain tensor of the same shape, dtype and device, its elements arbitrary.
at::Tensor blank(const at::Tensor& t) {
  return at::empty_strided(t.sizes(), t.strides(), t.options());
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

// Other libraries' gradients are formulas over what they saved: that must be one value, not a live
// weight of which some operations read the latent.
bool needs_autograd_cover(const c10::OperatorHandle& op) {
  using c10::DispatchKey;
  if (!op.hasSchema() || !reads_quantized(op)) return false;
  if (op.hasKernelForDispatchKey(DispatchKey::AutogradPrivateUse3)) return false;
  const auto& arguments = op.schema().arguments();
  return op.hasKernelForDispatchKey(DispatchKey::Autograd) &&
         std::none_of(arguments.begin(), arguments.end(), is_write);
}

// Registers `kernel` under `key` for every operator that `wanted` names; returns how many.
template <typename Wanted>
std::int64_t cover(c10::DispatchKey key, const Wanted& wanted,
                   const std::function<torch::CppFunction()>& kernel) {
  static auto* libraries = new std::vector<std::unique_ptr<torch::Library>>;
  auto& dispatcher = c10::Dispatcher::singleton();
  std::map<std::string, std::vector<std::string>> by_namespace;
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    const size_t colon = name.name.find("::");
    const std::string space = name.name.substr(0, colon);
    if (!op || space == "prim" || space == "prims" || space == "quantal" || !wanted(*op)) continue;
    const std::string overload = name.overload_name.empty() ? "" : "." + name.overload_name;
    by_namespace[space].push_back(name.name.substr(colon + 2) + overload);
  }
  std::int64_t covered = 0;
  for (const auto& [space, names] : by_namespace) {
    auto library =
        std::make_unique<torch::Library>(torch::Library::IMPL, space, key, __FILE__, __LINE__);
    for (const std::string& name : names) library->impl(name.c_str(), kernel());
    covered += static_cast<std::int64_t>(names.size());
    libraries->push_back(std::move(library));
  }
  return covered;
}

// The Autograd kernel that needs_autograd_cover() asks for.
void foreign_autograd_kernel(const c10::OperatorHandle& op, Stack* stack) {
  at::Tensor weight;
  replace_arguments(op.schema(), *stack, [&weight](const at::Tensor& t, bool) {
    if (is_weight(t)) weight = t;
    return dequantize_ste(t);
  });
  log_fallback(op.operator_name(), weight);
  op.callBoxed(stack);
}

}  // namespace

namespace {

// ATen folds a strided sequence into one product only where the weights require grad: live and
// frozen weights would be summed in different orders. A contiguous one it always folds.
template <at::Tensor (*read)(const at::Tensor&)>
void run_recurrent(const c10::OperatorHandle& op, Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const bool batch_first = stack->back().toBool();
  replace_arguments(schema, *stack, [](const at::Tensor& t, bool) { return read(t); });
  c10::IValue& input = (*stack)[stack->size() - schema.arguments().size()];
  const at::Tensor x = input.toTensor();
  input = (batch_first ? x.transpose(0, 1) : x).contiguous();
  stack->back() = false;
  op.callBoxed(stack);
  if (!batch_first) return;
  c10::IValue& output = (*stack)[stack->size() - schema.returns().size()];
  output = output.toTensor().transpose(0, 1);
}

}  // namespace

void recurrent_kernel(const c10::OperatorHandle& op, Stack* stack) {
  run_recurrent<quantized_value>(op, stack);
}

void recurrent_autograd_kernel(const c10::OperatorHandle& op, Stack* stack) {
  run_recurrent<dequantize_ste>(op, stack);
}

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
  replace_arguments(op.schema(), *stack, [](const at::Tensor& t, bool) { return blank(t); });
  op.callBoxed(stack);
}

void pool_backward_kernel(const c10::OperatorHandle& op, Stack* stack) {
  c10::IValue& input = (*stack)[stack->size() - op.schema().arguments().size() + 1];
  if (is_qtensor(input.toTensor())) input = blank(input.toTensor());
  replace_arguments(op.schema(), *stack,
                    [](const at::Tensor& t, bool) { return quantized_value(t); });
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
  using torch::CppFunction;
  static std::mutex mutex;
  static auto* covered = new std::int64_t(0);
  std::lock_guard lock(mutex);
  static auto* listener = new c10::RegistrationHandleRAII(
      c10::Dispatcher::singleton().addRegistrationListener(std::make_unique<Listener>()));
  (void)listener;
  operators_changed = false;
  *covered += cover(c10::DispatchKey::PrivateUse3, needs_cover,
                    [] { return CppFunction::makeFromBoxedFunction<&fallback_kernel>(); });
  cover(c10::DispatchKey::AutogradPrivateUse3, needs_autograd_cover,
        [] { return CppFunction::makeFromBoxedFunction<&foreign_autograd_kernel>(); });
  return *covered;
}

void cover_new_operators() {
  if (operators_changed) cover_operators();
}

}  // namespace quantal
