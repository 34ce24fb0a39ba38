#include "model/checkpoint_file.h"

#include "model/tensor_bytes.h"

namespace quantal {

CheckpointFile::CheckpointFile(const std::string& path) : path_(path) {
  if (path.ends_with(".index.json")) {
    for (auto& shard : value_or_raise(safetensors::open_shards(path))) {
      readers_.push_back(std::move(shard.reader));
    }
  } else {
    readers_.push_back(value_or_raise(safetensors::Reader::open(path)));
  }
  for (const safetensors::Reader& reader : readers_) {
    for (const auto& info : reader.tensors()) places_[info.name] = {&reader, &info};
  }
}

const safetensors::Metadata& CheckpointFile::metadata() const {
  static const safetensors::Metadata none;
  return readers_.empty() ? none : readers_.front().metadata();
}

const safetensors::TensorInfo& CheckpointFile::info(const std::string& key) const {
  return *places_.at(key).info;
}

at::Tensor CheckpointFile::take(const std::string& key) {
  const Place& place = places_.at(key);
  taken_.insert(key);
  return tensor_over(value_or_raise(place.reader->data(*place.info)), *place.info);
}

std::vector<std::string> CheckpointFile::left_over() const {
  std::vector<std::string> keys;
  for (const auto& [key, place] : places_) {
    if (!taken_.contains(key)) keys.push_back(key);
  }
  return keys;
}

}  // namespace quantal
