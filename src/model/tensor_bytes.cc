#include "model/tensor_bytes.h"

#include <ATen/ATen.h>

namespace quantal {
namespace {

using safetensors::Dtype;

struct DtypePair {
  Dtype file;
  at::ScalarType aten;
};

constexpr DtypePair kDtypes[] = {
    {Dtype::kBool, at::kBool},
    {Dtype::kU8, at::kByte},
    {Dtype::kI8, at::kChar},
    {Dtype::kF8E5M2, at::kFloat8_e5m2},
    {Dtype::kF8E4M3, at::kFloat8_e4m3fn},
    {Dtype::kF8E8M0, at::kFloat8_e8m0fnu},
    {Dtype::kF8E4M3FNUZ, at::kFloat8_e4m3fnuz},
    {Dtype::kF8E5M2FNUZ, at::kFloat8_e5m2fnuz},
    {Dtype::kI16, at::kShort},
    {Dtype::kU16, at::kUInt16},
    {Dtype::kF16, at::kHalf},
    {Dtype::kBF16, at::kBFloat16},
    {Dtype::kI32, at::kInt},
    {Dtype::kU32, at::kUInt32},
    {Dtype::kF32, at::kFloat},
    {Dtype::kC64, at::kComplexFloat},
    {Dtype::kF64, at::kDouble},
    {Dtype::kI64, at::kLong},
    {Dtype::kU64, at::kUInt64},
};

}  // namespace

void raise_unless_ok(const Status& status) {
  if (status.ok()) return;
  const bool is_system = status.code() == Errc::kIo || status.code() == Errc::kOutOfMemory;
  TORCH_CHECK(!is_system, status.message());
  TORCH_CHECK_VALUE(false, status.message());
}

Dtype file_dtype(at::ScalarType dtype, const std::string& name) {
  for (const DtypePair& pair : kDtypes) {
    if (pair.aten == dtype) return pair.file;
  }
  TORCH_CHECK_VALUE(false, "[quantal::save] '", name,
                    "': expected a dtype that safetensors has, got ", dtype);
}

at::ScalarType aten_dtype(Dtype dtype, const std::string& name) {
  for (const DtypePair& pair : kDtypes) {
    if (pair.file == dtype) return pair.aten;
  }
  TORCH_CHECK_VALUE(false, "[quantal::load] '", name, "': expected a dtype that torch has, got ",
                    safetensors::dtype_name(dtype));
}

at::Tensor tensor_over(const safetensors::Bytes& bytes, const safetensors::TensorInfo& info) {
  const std::vector<std::int64_t> sizes(info.shape.begin(), info.shape.end());
  const auto options = at::dtype(aten_dtype(info.dtype, info.name));
  if (bytes.size == 0) return at::empty(sizes, options);
  auto* data = const_cast<std::byte*>(bytes.data.get());
  return at::from_blob(data, sizes, [keep = bytes.data](void*) {}, options);
}

}  // namespace quantal
