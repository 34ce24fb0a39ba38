#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <quantal/qtype.h>
#include <quantal/quantize.h>
#include <quantal/safetensors.h>

#include "model/modules.h"

/// What a checkpoint's metadata says about its tensors (docs/formats.md, "The metadata").
namespace quantal {

/// The version that this library writes, and the newest it reads.
inline constexpr std::int64_t kCheckpointVersion = 1;

/// One quantized weight, or a float one that carries its layer's activations.
struct WeightRecord {
  std::optional<QType> weights;  ///< unset: a float weight
  std::vector<std::int64_t> shape;
  std::string dtype;  ///< of the logical tensor, in safetensors' names ("F32")
  std::int64_t group_size = 0;
  bool live = false;      ///< stored as float, quantized when read
  std::string quantizer;  ///< by name
  std::optional<double> snr_db;
  std::optional<QType> activations;
  bool input_calibrated = false;
  bool output_calibrated = false;
  bool quantize_output = false;
};

struct CheckpointMap {
  std::map<std::string, WeightRecord> weights;  ///< by key ("fc.weight")
  std::map<std::string, std::string> aliases;   ///< keys of shared tensors: where they are stored
};

safetensors::Metadata to_metadata(const CheckpointMap& map,
                                  const std::map<std::string, LayerTypes>& layers);

/// Nothing where another library wrote the file. ValueError naming `source` for a newer version
/// and for anything malformed.
std::optional<CheckpointMap> checkpoint_map(const safetensors::Metadata& metadata,
                                            const std::string& source);

/// The quantization map of optimum-quanto: in the metadata, or in quanto_qmap.json beside the file;
/// nothing where there is none.
std::optional<std::map<std::string, LayerTypes>> foreign_map(const safetensors::Metadata& metadata,
                                                             const std::string& path);

/// The keys of a weight's parts in optimum-quanto's layout.
struct PartKeys {
  std::string data;
  std::string scale;
  std::string shift;  ///< empty for symmetric types
};
PartKeys part_keys(const std::string& key, bool is_affine);

/// The key of a layer's scale at one edge: beside the weight where the module has just that, else
/// below the parameter's own key.
enum class Edge { kInput, kOutput };
std::string scale_key(const ModuleEntry& entry, const Slot& slot, Edge edge);

}  // namespace quantal
