#include "model/checkpoint_map.h"

#include <c10/util/Exception.h>

#include <filesystem>

#include <nlohmann/json.hpp>

#include "io/json_document.h"
#include "model/tensor_bytes.h"

namespace quantal {
namespace {

using nlohmann::json;

constexpr const char* kVersionKey = "quantal.format_version";
constexpr const char* kWeightsKey = "quantal.weights";
constexpr const char* kAliasesKey = "quantal.aliases";
constexpr const char* kMapKey = "quantization_map";

// Names that are not UTF-8 get this far; the writer then refuses the tensors that have them.
std::string dump(const json& value) {
  return value.dump(-1, ' ', /*ensure_ascii=*/false, json::error_handler_t::replace);
}

std::string name_or_none(const std::optional<QType>& qtype) {
  return qtype ? std::string(qtype->name) : "none";
}

json to_json(const WeightRecord& record) {
  json out = {{"weights", name_or_none(record.weights)},
              {"shape", record.shape},
              {"dtype", record.dtype},
              {"activations", name_or_none(record.activations)}};
  if (record.weights) {
    out["group_size"] = record.group_size;
    out["axis"] = 0;
    out["state"] = record.live ? "live" : "frozen";
    out["quantizer"] = record.quantizer;
    if (record.snr_db) out["snr_db"] = *record.snr_db;
  }
  if (record.activations) {
    out["input_calibrated"] = record.input_calibrated;
    out["output_calibrated"] = record.output_calibrated;
    out["quantize_output"] = record.quantize_output;
  }
  return out;
}

// Reads one object of the metadata; errors name the file and the place in it.
class Fields {
 public:
  Fields(const json& object, std::string where) : object_(object), where_(std::move(where)) {
    TORCH_CHECK_VALUE(object.is_object(), "[quantal::load] ", where_, ": expected an object, got ",
                      object.type_name());
  }

  std::string text(const char* field) const {
    const json& value = at(field);
    check(value.is_string(), field, "a string", value);
    return value.get<std::string>();
  }
  bool flag(const char* field) const {
    const json& value = at(field);
    check(value.is_boolean(), field, "a boolean", value);
    return value.get<bool>();
  }
  std::int64_t count(const char* field) const { return count(at(field), field); }
  std::vector<std::int64_t> counts(const char* field) const {
    const json& value = at(field);
    check(value.is_array(), field, "an array", value);
    std::vector<std::int64_t> out;
    for (const json& item : value) out.push_back(count(item, field));
    return out;
  }
  std::optional<double> number_if_any(const char* field) const {
    if (!object_.contains(field)) return std::nullopt;
    check(object_[field].is_number(), field, "a number", object_[field]);
    return object_[field].get<double>();
  }
  std::optional<QType> qtype(const char* field) const {
    const std::string name = text(field);
    if (name == "none") return std::nullopt;
    const auto found = find_qtype(name);
    check(found.has_value(), field, "the name of a qtype", at(field));
    return found;
  }

 private:
  const json& at(const char* field) const {
    const auto found = object_.find(field);
    TORCH_CHECK_VALUE(found != object_.end(), "[quantal::load] ", where_, ": expected a field '",
                      field, "', got none");
    return *found;
  }
  std::int64_t count(const json& value, const char* field) const {
    const bool fits = value.is_number_unsigned() && value.get<std::uint64_t>() <= std::uint64_t{1}
                                                                                      << 62;
    check(fits, field, "non-negative integers", value);
    return value.get<std::int64_t>();
  }
  void check(bool holds, const char* field, const char* wanted, const json& got) const {
    TORCH_CHECK_VALUE(holds, "[quantal::load] ", where_, ": expected '", field, "' to be ", wanted,
                      ", got ", dump(got).substr(0, 80));
  }

  const json& object_;
  std::string where_;
};

WeightRecord record_from(const Fields& fields) {
  WeightRecord record;
  record.weights = fields.qtype("weights");
  record.shape = fields.counts("shape");
  record.dtype = fields.text("dtype");
  record.activations = fields.qtype("activations");
  if (record.weights) {
    record.group_size = fields.count("group_size");
    record.live = fields.text("state") == "live";
    record.quantizer = fields.text("quantizer");
    record.snr_db = fields.number_if_any("snr_db");
  }
  if (record.activations) {
    record.input_calibrated = fields.flag("input_calibrated");
    record.output_calibrated = fields.flag("output_calibrated");
    record.quantize_output = fields.flag("quantize_output");
  }
  return record;
}

json parsed(const safetensors::Metadata& metadata, const char* key, const std::string& source) {
  const auto found = metadata.find(key);
  TORCH_CHECK_VALUE(found != metadata.end(), "[quantal::load] '", source, "': expected metadata '",
                    key, "', got none");
  return value_or_raise(io::parse_json(found->second, source + "', metadata '" + key));
}

std::map<std::string, LayerTypes> layer_types(const json& map, const std::string& source) {
  TORCH_CHECK_VALUE(map.is_object(), "[quantal::load] '", source,
                    "': expected a quantization map (an object), got ", map.type_name());
  std::map<std::string, LayerTypes> layers;
  for (const auto& [name, types] : map.items()) {
    const Fields fields(types, "'" + source + "', quantization map of '" + name + "'");
    fields.qtype("weights");
    fields.qtype("activations");
    layers[name] = {fields.text("weights"), fields.text("activations")};
  }
  return layers;
}

}  // namespace

safetensors::Metadata to_metadata(const CheckpointMap& map,
                                  const std::map<std::string, LayerTypes>& layers) {
  json weights = json::object(), types = json::object();
  for (const auto& [key, record] : map.weights) weights[key] = to_json(record);
  for (const auto& [name, layer] : layers) {
    types[name] = {{"weights", layer.weights}, {"activations", layer.activations}};
  }
  return {{"format", "pt"},  // what transformers asks of a file
          {kVersionKey, std::to_string(kCheckpointVersion)},
          {kWeightsKey, dump(weights)},
          {kAliasesKey, dump(map.aliases)},
          {kMapKey, dump(types)}};
}

std::optional<CheckpointMap> checkpoint_map(const safetensors::Metadata& metadata,
                                            const std::string& source) {
  const auto version = metadata.find(kVersionKey);
  if (version == metadata.end()) return std::nullopt;
  TORCH_CHECK_VALUE(version->second == std::to_string(kCheckpointVersion), "[quantal::load] '",
                    source, "': expected format version ", kCheckpointVersion, ", got '",
                    version->second, "': a newer Quantal reads it");
  CheckpointMap map;
  const json weights = parsed(metadata, kWeightsKey, source);
  const json aliases = parsed(metadata, kAliasesKey, source);
  TORCH_CHECK_VALUE(weights.is_object() && aliases.is_object(), "[quantal::load] '", source,
                    "': expected objects as metadata");
  for (const auto& [key, record] : weights.items()) {
    map.weights[key] = record_from(Fields(record, "'" + source + "', weight '" + key + "'"));
  }
  for (const auto& [key, target] : aliases.items()) {
    TORCH_CHECK_VALUE(target.is_string(), "[quantal::load] '", source, "': expected alias '", key,
                      "' to name a tensor, got ", target.type_name());
    map.aliases[key] = target.get<std::string>();
  }
  return map;
}

std::optional<std::map<std::string, LayerTypes>> foreign_map(const safetensors::Metadata& metadata,
                                                             const std::string& path) {
  if (metadata.contains(kMapKey)) return layer_types(parsed(metadata, kMapKey, path), path);
  const std::filesystem::path beside =
      std::filesystem::path(path).parent_path() / "quanto_qmap.json";
  std::error_code unreadable;
  if (!std::filesystem::exists(beside, unreadable)) return std::nullopt;
  return layer_types(value_or_raise(io::read_json(beside.string())), beside.string());
}

PartKeys part_keys(const std::string& key, bool is_affine) {
  if (!is_affine) return {key + "._data", key + "._scale", ""};
  return {key + "._data._data", key + "._scale", key + "._shift"};
}

std::string scale_key(const ModuleEntry& entry, const Slot& slot, Edge edge) {
  const std::string name = edge == Edge::kInput ? "input_scale" : "output_scale";
  if (slot.parameter != "weight") return entry.key(slot) + "." + name;
  return entry.name.empty() ? name : entry.name + "." + name;
}

}  // namespace quantal
