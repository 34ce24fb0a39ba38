#pragma once

#include <string>

#include <quantal/api.h>
#include <quantal/model.h>

/// Models in safetensors files (docs/formats.md): optimum-quanto's keys, and in the metadata
/// everything that it takes to quantize a fresh model the same way.
namespace quantal {

/// Writes parameters, buffers, scales and the quantization map. Atomic: on any error the old file
/// stays. The same model gives the same bytes. Weights that modules share are written once.
QUANTAL_API void save(const Model& model, const std::string& path);

/// Quantizes a float model as the file says and loads it: afterwards it computes what the saved
/// one did, bit for bit. Reads Quantal's files, and optimum-quanto's: with the map in the file's
/// metadata, in `quanto_qmap.json` beside it, or found out from the keys.
///
/// ValueError naming the tensor, with the model as it was: missing, extra or misshaped tensors,
/// other dtypes, non-finite or non-positive scales, an unknown format version.
QUANTAL_API void requantize(const Model& model, const std::string& path);

/// Loads a file into a model that is already quantized (or float) just as the file says. Errors as
/// requantize(), and ValueError where the two differ.
QUANTAL_API void load(const Model& model, const std::string& path);

}  // namespace quantal
