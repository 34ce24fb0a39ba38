#include "ops/float_conv.h"

#include <ATen/ATen.h>

#include <utility>
#include <vector>

#include "ops/cpu_kernels.h"
#include "ops/cpu_weights.h"

namespace quantal {
namespace {

constexpr std::int64_t kKeptBytes = 4 << 20;

// Memory that a thread keeps from one use to the next. A use within another, and one whose tensor
// lives on, has memory of its own.
class KeptMemory {
 public:
  KeptMemory() : storage_(std::exchange(kept(), {})) {
    if (!storage_) storage_ = weight_memory({kKeptBytes}, at::kByte).storage();
  }
  ~KeptMemory() {
    if (storage_.use_count() == 1) kept() = std::move(storage_);
  }
  KeptMemory(const KeptMemory&) = delete;
  KeptMemory& operator=(const KeptMemory&) = delete;

  // Uninitialised; fresh where it does not fit.
  at::Tensor tensor(at::IntArrayRef sizes, at::ScalarType dtype) const {
    const auto size = static_cast<std::int64_t>(c10::elementSize(dtype));
    if (c10::multiply_integers(sizes) * size > kKeptBytes) return at::empty(sizes, dtype);
    const auto release = [held = storage_](void*) {};
    return at::from_blob(storage_.mutable_data(), sizes, release, dtype);
  }

 private:
  static c10::Storage& kept() {
    thread_local c10::Storage storage;
    return storage;
  }

  c10::Storage storage_;
};

// Parts of the rows, of about one size, each of which fits the kept memory. Groups stay together.
std::int64_t parts_of(const WeightCodes& weight, std::int64_t groups, at::ScalarType dtype) {
  if (groups != 1) return 1;
  const std::int64_t row_bytes =
      weight.row_length() * static_cast<std::int64_t>(c10::elementSize(dtype));
  const std::int64_t rows =
      std::max<std::int64_t>(1, kKeptBytes / std::max<std::int64_t>(1, row_bytes));
  return (weight.rows() + rows - 1) / rows;
}

// Whether torch takes longer to reorder the weight for pixels whose channels lie together than it
// takes to copy input and output.
bool prefers_planes(const at::Tensor& x, const WeightCodes& weight, const ConvParams& params) {
  if (x.suggest_memory_format() == at::MemoryFormat::Contiguous) return false;
  const auto shape = conv_shape(x.sizes(), weight.sizes, params);
  if (!shape || shape->taps() == 1) return false;
  const std::int64_t copied = x.numel() + shape->batch * shape->positions() * shape->rows;
  return shape->rows * shape->columns() > 2 * copied;
}

}  // namespace

at::Tensor float_convolution(const at::Tensor& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias, const ConvParams& p) {
  return at::convolution(x, weight, bias, p.stride, p.padding, p.dilation, p.transposed,
                         p.output_padding, p.groups);
}

at::Tensor dequantized_convolution(const at::Tensor& x, const WeightCodes& weight,
                                   const std::optional<at::Tensor>& bias,
                                   const ConvParams& params) {
  const at::ScalarType dtype = x.scalar_type();
  const at::MemoryFormat format = x.suggest_memory_format();
  if (params.transposed || weight.rows() == 0 || !gathers_on_cpu(weight, dtype)) {
    return float_convolution(x, dequantize(weight, dtype), bias, params).contiguous(format);
  }
  const at::Tensor input = prefers_planes(x, weight, params) ? x.contiguous() : x;
  const std::int64_t parts = parts_of(weight, params.groups, dtype);
  const KeptMemory memory;
  std::vector<at::Tensor> results;
  for (std::int64_t i = 0; i < parts; ++i) {
    const std::int64_t begin = weight.rows() * i / parts, end = weight.rows() * (i + 1) / parts;
    std::vector<std::int64_t> sizes = weight.sizes;
    sizes[0] = end - begin;
    const at::Tensor rows = memory.tensor(sizes, dtype);
    dequantize_into(weight, begin, rows);
    const auto added = bias ? std::optional(bias->narrow(0, begin, end - begin)) : bias;
    results.push_back(float_convolution(input, rows, added, params));
  }
  return (parts == 1 ? results[0] : at::cat(results, 1)).contiguous(format);
}

}  // namespace quantal
