#include "ops/weight_only_conv.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels/gather.h"
#include "ops/canonical_weight.h"
#include "ops/cpu_kernels.h"
#include "ops/cpu_weights.h"

namespace quantal {
namespace {

using kernels::ConvShape;

constexpr std::int64_t kKeptBytes = 4 << 20;
// What a thread dequantizes before it puts it in another order: half of a first-level cache.
constexpr std::int64_t kOrderedBytes = 16 << 10;

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

// Parts of the rows, or of the groups, of about one size, of which each fits the kept memory.
class Parts {
 public:
  Parts(at::IntArrayRef sizes, std::int64_t groups, at::ScalarType dtype)
      : rows_(sizes[0]), channels_(sizes[1]), groups_(groups) {
    const std::int64_t whole = groups == 1 ? rows_ : groups;
    const std::int64_t bytes =
        c10::multiply_integers(sizes) * static_cast<std::int64_t>(c10::elementSize(dtype)) / whole;
    const std::int64_t most =
        std::max<std::int64_t>(1, kKeptBytes / std::max<std::int64_t>(1, bytes));
    count_ = (whole + most - 1) / most;
  }

  struct Part {
    std::int64_t begin, rows;
    std::int64_t groups, first_channel, channels;
  };
  std::int64_t count() const { return count_; }
  Part operator[](std::int64_t i) const {
    const std::int64_t whole = groups_ == 1 ? rows_ : groups_;
    const std::int64_t first = whole * i / count_, size = whole * (i + 1) / count_ - first;
    if (groups_ == 1) return {first, size, 1, 0, channels_};
    const std::int64_t rows = rows_ / groups_;
    return {first * rows, size * rows, size, first * channels_, size * channels_};
  }

 private:
  std::int64_t rows_, channels_, groups_, count_;
};

// Whether torch's convolution of pixels whose channels lie together takes so much longer with this
// large a weight that copying input and output is worth it.
bool prefers_planes(const ConvShape& shape, const at::Tensor& x) {
  if (x.suggest_memory_format() == at::MemoryFormat::Contiguous || shape.taps() == 1 ||
      shape.groups != 1) {
    return false;
  }
  const std::int64_t copied = x.numel() + shape.batch * shape.positions() * shape.rows;
  return shape.rows * shape.columns() > 2 * copied;
}

// (rows, channels, taps) to (rows, taps, channels).
template <typename Element>
void put_channels_last(const ConvShape& shape, std::int64_t rows, const Element* from,
                       Element* to) {
  const std::int64_t channels = shape.group_channels(), taps = shape.taps();
  for (std::int64_t r = 0; r < rows; ++r, from += channels * taps) {
    for (std::int64_t t = 0; t < taps; ++t, to += channels) {
      for (std::int64_t c = 0; c < channels; ++c) to[c] = from[c * taps + t];
    }
  }
}

// Rows from `begin` on into `out`, (rows, kernel, channels) and contiguous.
template <typename Element>
void dequantize_channels_last(const WeightCodes& weight, const ConvShape& shape, std::int64_t begin,
                              const at::Tensor& out) {
  const CanonicalPointers canonical(weight);
  const kernels::FloatType type = *float_type(out.scalar_type());
  const std::int64_t columns = shape.columns(), rows = out.size(0);
  const std::int64_t step =
      std::max<std::int64_t>(1, kOrderedBytes / (columns * kernels::size_of(type)));
  auto* const to = static_cast<Element*>(out.mutable_data_ptr());
  threads_for(out.numel())((rows + step - 1) / step, [&](std::int64_t first, std::int64_t last) {
    std::vector<Element> block(step * columns);
    for (std::int64_t i = first * step; i < std::min(rows, last * step); i += step) {
      const std::int64_t count = std::min(step, rows - i);
      kernels::dequantize_canonical(kernel_isa(), canonical.spec, canonical.weight(), begin + i,
                                    count, type, block.data());
      put_channels_last(shape, count, block.data(), to + i * columns);
    }
  });
}

// Rows [begin, end) of the value in memory that is kept, in the memory format of `x`: torch would
// take several times as long to bring it there.
at::Tensor rows_like(const at::Tensor& x, const ConvShape& shape, const WeightCodes& weight,
                     std::int64_t begin, std::int64_t end, const KeptMemory& memory) {
  const at::ScalarType dtype = x.scalar_type();
  std::vector<std::int64_t> sizes = weight.sizes;
  sizes[0] = end - begin;
  const bool is_ordered = x.suggest_memory_format() == at::MemoryFormat::Contiguous ||
                          shape.taps() == 1 || shape.group_channels() == 1;
  if (is_ordered) {
    const at::Tensor rows = memory.tensor(sizes, dtype);
    dequantize_into(weight, begin, rows);
    return rows;
  }
  std::rotate(sizes.begin() + 1, sizes.begin() + 2, sizes.end());
  const at::Tensor rows = memory.tensor(sizes, dtype);
  if (dtype == at::kFloat) {
    dequantize_channels_last<float>(weight, shape, begin, rows);
  } else {
    dequantize_channels_last<std::uint16_t>(weight, shape, begin, rows);
  }
  return rows.movedim(-1, 1);
}

at::Tensor convolution_by_parts(const ConvShape& shape, const at::Tensor& x,
                                const WeightCodes& weight, const std::optional<at::Tensor>& bias,
                                const ConvParams& params) {
  const at::Tensor input = prefers_planes(shape, x) ? x.contiguous() : x;
  const KeptMemory memory;
  const DecodeRows decode = [&](std::int64_t begin, std::int64_t count) {
    return rows_like(input, shape, weight, begin, begin + count, memory);
  };
  return convolution_of_rows(input, weight.sizes, decode, bias, params)
      .contiguous(x.suggest_memory_format());
}

}  // namespace

at::Tensor aten_convolution(const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const ConvParams& p) {
  return at::convolution(x, weight, bias, p.stride, p.padding, p.dilation, p.transposed,
                         p.output_padding, p.groups);
}

DecodeRows decoding(const WeightCodes& weight, at::ScalarType dtype) {
  return [&weight, dtype](std::int64_t begin, std::int64_t count) {
    if (!gathers_on_cpu(weight, dtype)) {
      const auto device = weight.data.device();
      return decode_rows(weight, at::arange(begin, begin + count, device), dtype);
    }
    std::vector<std::int64_t> sizes = weight.sizes;
    sizes[0] = count;
    const at::Tensor rows = at::empty(sizes, dtype);
    dequantize_into(weight, begin, rows);
    return rows;
  };
}

at::Tensor convolution_of_rows(const at::Tensor& x, at::IntArrayRef sizes, const DecodeRows& decode,
                               const std::optional<at::Tensor>& bias, const ConvParams& params) {
  const Parts parts(sizes, params.groups, x.scalar_type());
  std::vector<at::Tensor> results;
  for (std::int64_t i = 0; i < parts.count(); ++i) {
    const Parts::Part part = parts[i];
    ConvParams own = params;
    own.groups = part.groups;
    const auto added = bias ? std::optional(bias->narrow(0, part.begin, part.rows)) : bias;
    results.push_back(aten_convolution(x.narrow(1, part.first_channel, part.channels),
                                       decode(part.begin, part.rows).to(x.scalar_type()), added,
                                       own));
  }
  return (results.size() == 1 ? results[0] : at::cat(results, 1))
      .contiguous(x.suggest_memory_format());
}

at::Tensor convolution_input_grad(const at::Tensor& grad, const at::Tensor& x,
                                  at::IntArrayRef sizes, const DecodeRows& decode,
                                  const ConvParams& p) {
  const Parts parts(sizes, p.groups, x.scalar_type());
  std::vector<at::Tensor> grads;
  for (std::int64_t i = 0; i < parts.count(); ++i) {
    const Parts::Part part = parts[i];
    const at::Tensor weight = decode(part.begin, part.rows).to(x.scalar_type());
    const at::Tensor own = std::get<0>(at::convolution_backward(
        grad.narrow(1, part.begin, part.rows), x.narrow(1, part.first_channel, part.channels),
        weight, at::OptionalIntArrayRef(), p.stride, p.padding, p.dilation, p.transposed,
        p.output_padding, part.groups, {true, false, false}));
    if (p.groups > 1 || grads.empty()) {
      grads.push_back(own);
    } else {
      grads[0] = grads[0] + own;
    }
  }
  return grads.size() == 1 ? grads[0] : at::cat(grads, 1);
}

at::Tensor convolution_bias_grad(const at::Tensor& grad) {
  std::vector<std::int64_t> others(grad.dim() - 1, 0);
  std::iota(others.begin() + 1, others.end(), 2);
  return grad.sum(others);
}

at::Tensor weight_only_convolution(const at::Tensor& x, const WeightCodes& weight,
                                   const std::optional<at::Tensor>& bias,
                                   const ConvParams& params) {
  const at::ScalarType dtype = x.scalar_type();
  const auto shape = conv_shape(x.sizes(), weight.sizes, params);
  const bool has_kernels = gathers_on_cpu(weight, dtype) && PackedWeight::takes_activations(x);
  // Where something does not fit, torch names it.
  if (!shape || !has_kernels || (bias && bias->sizes() != at::IntArrayRef(shape->rows))) {
    return aten_convolution(x, dequantize(weight, dtype), bias, params)
        .contiguous(x.suggest_memory_format());
  }
  const at::Tensor added = bias.value_or(at::Tensor());
  switch (conv_way(*shape, x)) {
    case ConvWay::kDirect:
      return direct_convolution(weight, *shape, x, added);
    case ConvWay::kGrouped: {
      const KeptMemory memory;
      const at::Tensor floats = memory.tensor(weight.sizes, at::kFloat);
      dequantize_into(weight, 0, floats);
      return grouped_convolution(floats, *shape, x, added);
    }
    case ConvWay::kPatches:
      return patch_convolution(*shape, x, [&](const at::Tensor& patches) {
        return CanonicalMatrix(weight).linear(patches, added, std::nullopt, {});
      });
    case ConvWay::kAten:
      break;
  }
  return convolution_by_parts(*shape, x, weight, bias, params);
}

}  // namespace quantal
