// Copies of one linear layer in ggml, computed by one graph: what benchmarks/peers/ggml.py times.
// Every function that fails returns null or false; ggml_linear_error() then says why.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

template <auto release>
struct Releaser {
  template <typename T>
  void operator()(T* resource) const {
    release(resource);
  }
};
using Context = std::unique_ptr<ggml_context, Releaser<ggml_free>>;
using Backend = std::unique_ptr<ggml_backend, Releaser<ggml_backend_free>>;
using Buffer = std::unique_ptr<ggml_backend_buffer, Releaser<ggml_backend_buffer_free>>;

std::string last_error;

std::nullptr_t fail(std::string why) {
  last_error = std::move(why);
  return nullptr;
}

Context make_context(std::size_t bytes) {
  return Context(ggml_init({.mem_size = bytes, .mem_buffer = nullptr, .no_alloc = true}));
}

bool find_type(const char* name, ggml_type& found) {
  for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
    const auto type = static_cast<ggml_type>(i);
    const char* known = ggml_type_name(type);
    if (known != nullptr && std::strcmp(known, name) == 0) {
      found = type;
      return true;
    }
  }
  return false;
}

// The buffer type that reorders weights for the processor's widest kernels, or null.
ggml_backend_buffer_type_t repacking_buffer_type(ggml_backend_t backend) {
  ggml_backend_dev_t device = ggml_backend_get_device(backend);
  const auto list =
      reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
          ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  if (list == nullptr) return nullptr;
  for (auto* types = list(device); types != nullptr && *types != nullptr; ++types) {
    if (std::strstr(ggml_backend_buft_name(*types), "REPACK") != nullptr) return *types;
  }
  return nullptr;
}

}  // namespace

// Members are released in the reverse order: the graph before the weights that it reads.
struct GgmlLinears {
  Backend backend;
  Context weight_context;
  Buffer weight_buffer;
  std::vector<ggml_tensor*> weights;
  Context graph_context;
  Buffer graph_buffer;
  ggml_cgraph* graph = nullptr;
  ggml_tensor* first_output = nullptr;
};

extern "C" {

const char* ggml_linear_version() { return ggml_version(); }
const char* ggml_linear_error() { return last_error.c_str(); }
void ggml_linear_free(GgmlLinears* linears) { delete linears; }

std::size_t ggml_linear_weight_bytes(const GgmlLinears* linears) {
  return ggml_nbytes(linears->weights.front());
}

// `copies` copies of a weight (rows, columns), quantized to ggml's type of that name.
GgmlLinears* ggml_linear_new(const char* type_name, bool repack, std::int64_t rows,
                             std::int64_t columns, const float* weight, int copies, int threads) {
  ggml_type type;
  if (!find_type(type_name, type)) return fail("no type of that name");
  if (columns % ggml_blck_size(type) != 0) return fail("columns do not fill whole blocks");

  auto made = std::make_unique<GgmlLinears>();
  made->backend.reset(ggml_backend_cpu_init());
  ggml_backend_cpu_set_n_threads(made->backend.get(), threads);
  ggml_backend_buffer_type_t place = ggml_backend_cpu_buffer_type();
  if (repack) place = repacking_buffer_type(made->backend.get());
  if (place == nullptr) return fail("this build cannot repack weights");

  made->weight_context = make_context(ggml_tensor_overhead() * static_cast<std::size_t>(copies));
  for (int i = 0; i < copies; ++i) {
    made->weights.push_back(ggml_new_tensor_2d(made->weight_context.get(), type, columns, rows));
  }
  made->weight_buffer.reset(
      ggml_backend_alloc_ctx_tensors_from_buft(made->weight_context.get(), place));
  if (!made->weight_buffer) return fail("out of memory for the weights");
  if (repack && made->weights.front()->extra == nullptr) {
    return fail("no repacked kernel for this type on this processor");
  }

  std::vector<std::byte> quantized(ggml_nbytes(made->weights.front()));
  ggml_quantize_chunk(type, weight, quantized.data(), 0, rows, columns, nullptr);
  for (ggml_tensor* copy : made->weights) {
    ggml_backend_tensor_set(copy, quantized.data(), 0, quantized.size());
  }
  return made.release();
}

// Makes the graph that multiplies x (tokens, columns) by the first `copies` weights.
bool ggml_linear_bind(GgmlLinears* linears, const float* x, std::int64_t tokens, int copies) {
  linears->graph_buffer.reset();
  const auto count = static_cast<std::size_t>(copies);
  linears->graph_context =
      make_context(ggml_tensor_overhead() * (2 * count + 8) + ggml_graph_overhead());
  ggml_context* context = linears->graph_context.get();

  ggml_tensor* input =
      ggml_new_tensor_2d(context, GGML_TYPE_F32, linears->weights.front()->ne[0], tokens);
  linears->graph = ggml_new_graph(context);
  linears->first_output = nullptr;
  for (std::size_t i = 0; i < count; ++i) {
    ggml_tensor* output = ggml_mul_mat(context, linears->weights[i], input);
    if (i == 0) linears->first_output = output;
    ggml_build_forward_expand(linears->graph, output);
  }
  linears->graph_buffer.reset(
      ggml_backend_alloc_ctx_tensors_from_buft(context, ggml_backend_cpu_buffer_type()));
  if (!linears->graph_buffer) return fail("out of memory for the activations") != nullptr;
  if (!ggml_backend_supports_op(linears->backend.get(), linears->first_output)) {
    return fail("unsupported operation") != nullptr;
  }
  ggml_backend_tensor_set(input, x, 0, ggml_nbytes(input));
  return true;
}

bool ggml_linear_run(GgmlLinears* linears) {
  return ggml_backend_graph_compute(linears->backend.get(), linears->graph) == GGML_STATUS_SUCCESS;
}

// Copies what the first weight gave, (tokens, rows), to y.
void ggml_linear_output(const GgmlLinears* linears, float* y) {
  ggml_backend_tensor_get(linears->first_output, y, 0, ggml_nbytes(linears->first_output));
}

}  // extern "C"
