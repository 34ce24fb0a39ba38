#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include <quantal/safetensors.h>

namespace quantal {

/// The tensors of one file, or of all shards that a `*.index.json` names. Notes which were taken.
class CheckpointFile {
 public:
  /// Errors as Reader::open() and open_shards(), raised.
  explicit CheckpointFile(const std::string& path);

  const std::string& path() const { return path_; }
  /// Of the file, or of the first shard.
  const safetensors::Metadata& metadata() const;
  bool has(const std::string& key) const { return places_.contains(key); }
  /// Precondition: has(key).
  const safetensors::TensorInfo& info(const std::string& key) const;
  /// The tensor on the CPU, over the file's mapping where it has one. Precondition: has(key).
  at::Tensor take(const std::string& key);
  /// The keys that nobody took.
  std::vector<std::string> left_over() const;

 private:
  struct Place {
    const safetensors::Reader* reader;
    const safetensors::TensorInfo* info;
  };

  std::string path_;
  std::vector<safetensors::Reader> readers_;
  std::map<std::string, Place> places_;
  std::set<std::string> taken_;
};

}  // namespace quantal
