#include "model/foreign_checkpoint.h"

#include <c10/util/Exception.h>

#include "model/tensor_bytes.h"
#include "ops/weight_codes.h"
#include "quantizers/weight_scheme.h"

namespace quantal {
namespace {

using Shape = std::vector<std::uint64_t>;

std::int64_t dim_or_one(const Shape& shape, size_t i) {
  return i < shape.size() ? static_cast<std::int64_t>(shape[i]) : 1;
}

// optimum-quanto writes no group size; one row of codes and one scale a group tell it.
std::int64_t stored_group_size(const CheckpointFile& file, const PartKeys& keys,
                               std::int64_t rows) {
  const std::int64_t groups = dim_or_one(file.info(keys.scale).shape, 0);
  return groups == rows ? 0 : dim_or_one(file.info(keys.data).shape, 1);
}

// Packed codes have 4 or 2 bits: as many as it takes to hold all groups (or rows).
QType packed_qtype(const CheckpointFile& file, const PartKeys& keys, const std::string& key) {
  const std::int64_t rows = dim_or_one(file.info(keys.scale).shape, 0);
  const std::int64_t packed = dim_or_one(file.info(keys.data).shape, 0);
  const bool is_int4 = packed == (rows + 1) / 2;
  const bool is_int2 = packed == (rows + 3) / 4;
  TORCH_CHECK_VALUE(is_int4 != is_int2, "[quantal::load] '", file.path(), "', tensor '", key,
                    "': its parts do not tell qint4 from qint2: a quantization map is needed");
  return is_int4 ? qint4 : qint2;
}

QType byte_qtype(const CheckpointFile& file, const PartKeys& keys, const std::string& key) {
  const at::ScalarType dtype = aten_dtype(file.info(keys.data).dtype, keys.data);
  for (const QType& qtype : all_qtypes()) {
    if (!qtype.is_affine() && code_dtype(qtype) == dtype) return qtype;
  }
  TORCH_CHECK_VALUE(false, "[quantal::load] '", file.path(), "', tensor '", key,
                    "': expected int8 or float8 codes, got ", dtype);
}

std::optional<QType> stored_qtype(const CheckpointFile& file, const std::string& key) {
  for (const bool is_affine : {false, true}) {
    const PartKeys keys = part_keys(key, is_affine);
    if (!file.has(keys.data)) continue;
    TORCH_CHECK_VALUE(file.has(keys.scale), "[quantal::load] '", file.path(),
                      "': expected tensor '", keys.scale, "', got none");
    return is_affine ? packed_qtype(file, keys, key) : byte_qtype(file, keys, key);
  }
  return std::nullopt;
}

const LayerTypes* types_of(const ForeignMap& map, const ModuleEntry& entry, const Slot& slot) {
  if (!map || slot.parameter != "weight") return nullptr;
  const auto found = map->find(entry.name);
  return found != map->end() ? &found->second : nullptr;
}

}  // namespace

std::optional<WeightRecord> foreign_record(const CheckpointFile& file, const ForeignMap& map,
                                           const ModuleEntry& entry, const Slot& slot,
                                           const std::string& key) {
  const LayerTypes* types = types_of(map, entry, slot);
  WeightRecord record;
  if (types != nullptr) {
    record.weights = find_qtype(types->weights);
    record.activations = find_qtype(types->activations);
    if (!record.weights && !record.activations) return std::nullopt;
  }
  const bool packed = file.has(part_keys(key, true).data);
  record.live = !packed && !file.has(part_keys(key, false).data);
  if (!record.live) {
    if (types == nullptr) record.weights = stored_qtype(file, key);
    TORCH_CHECK_VALUE(record.weights && record.weights->is_affine() == packed, "[quantal::load] '",
                      file.path(), "', tensor '", key, "': the map says ",
                      record.weights ? record.weights->name : "none", ", the parts are ",
                      packed ? "packed codes" : "bytes");
  } else if (types == nullptr) {
    return std::nullopt;
  }
  record.shape = slot.tensor.sizes().vec();
  record.dtype = safetensors::dtype_name(file_dtype(slot.tensor.scalar_type(), key));
  if (record.weights) {
    const std::int64_t rows = slot.tensor.dim() > 0 ? slot.tensor.size(0) : 1;
    const std::int64_t row = rows > 0 ? slot.tensor.numel() / rows : 0;
    const PartKeys keys = part_keys(key, packed);
    record.group_size = packed && file.has(keys.scale) ? stored_group_size(file, keys, rows)
                                                       : default_group_size(*record.weights, row);
    record.quantizer = default_quantizer(*record.weights)->name();
  }
  return record;
}

}  // namespace quantal
