#pragma once

#include <map>
#include <optional>
#include <string>

#include "model/checkpoint_file.h"
#include "model/checkpoint_map.h"
#include "model/modules.h"

namespace quantal {

/// optimum-quanto's map of layers, or nothing where the file comes without one.
using ForeignMap = std::optional<std::map<std::string, LayerTypes>>;

/// The record that optimum-quanto did not write for the weight stored as `key`: from the map, the
/// keys and the shapes of the parts. Nothing where the weight is an ordinary tensor. ValueError
/// where map and keys contradict each other, or the keys alone do not tell.
std::optional<WeightRecord> foreign_record(const CheckpointFile& file, const ForeignMap& map,
                                           const ModuleEntry& entry, const Slot& slot,
                                           const std::string& key);

}  // namespace quantal
