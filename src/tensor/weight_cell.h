#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/packed_weight.h"
#include "ops/weight_codes.h"
#include "quantizers/weight_scheme.h"
#include "tensor/layer_state.h"

namespace quantal {

/// What a weight is, shared by the weight and every alias of it (detach, t, row slices).
class WeightCell {
 public:
  /// Live, over `latent` (not an inference tensor). Without a scheme: a float weight that only
  /// carries its layer's activations (LayerNorm).
  WeightCell(std::optional<WeightScheme> scheme, at::Tensor latent);
  /// Frozen.
  WeightCell(std::optional<WeightScheme> scheme, std::shared_ptr<const WeightCodes> codes);
  /// Of a bound weight (bound_weight.h): live, of `sizes`, and without a value to read or write.
  static std::shared_ptr<WeightCell> without_value(at::IntArrayRef sizes, at::ScalarType dtype);

  bool live() const { return latent_.defined(); }
  /// Raises for a cell without a value.
  const at::Tensor& latent() const;
  const std::optional<WeightScheme>& scheme() const { return scheme_; }
  /// The logical sizes: (rows, …).
  at::IntArrayRef sizes() const { return live() ? latent_.sizes() : at::IntArrayRef(sizes_); }
  at::Device device() const { return live() ? latent_.device() : device_; }

  // The quantized value, in one of two forms: as canonical codes, or packed for the CPU's kernels
  // once those were asked for, never both. That of a live weight is made anew when the latent
  // changed. All raise where a float view of a frozen weight was written. Precondition: scheme().

  /// The canonical codes; made for the caller where the value is packed.
  std::shared_ptr<const WeightCodes> codes();
  /// The canonical codes; null where the value is packed.
  std::shared_ptr<const WeightCodes> canonical();
  /// The packed form, which replaces the codes; null where kernels do not take it.
  std::shared_ptr<const PackedWeight> packed();
  /// Rows [begin, begin + count) of the float value, which packs it where kernels take it.
  at::Tensor decode(std::int64_t begin, std::int64_t count, at::ScalarType dtype);
  /// Rows `indices` (1-D, int64).
  at::Tensor decode_rows(const at::Tensor& indices, at::ScalarType dtype);
  /// Bytes of codes, scales and shifts.
  std::int64_t nbytes();

  /// Turns the cell into a frozen one.
  void freeze(std::shared_ptr<const WeightCodes> codes);
  /// Replaces a frozen cell's codes, as part of an in-place operation on the weight.
  void replace_codes(std::shared_ptr<const WeightCodes> codes);
  /// Gives a live cell codes that hold until its latent is written.
  void seed_cache(std::shared_ptr<const WeightCodes> codes);
  /// A float view of the weight went out through a tensor with this version counter: writes to the
  /// view move that counter and no other.
  void watch(const c10::VariableVersion& counter);

  std::shared_ptr<LayerState> layer;

 private:
  using CacheKey = std::pair<std::uint32_t, const void*>;
  struct Watched {
    c10::VariableVersion counter;
    std::optional<std::uint32_t> seen;  ///< unset: whatever it is when next looked at
  };

  CacheKey cache_key() const;
  bool views_were_written();
  /// Makes the value the current one. Precondition: mutex_ is held.
  void update();
  void set_value(std::shared_ptr<const WeightCodes> codes);

  std::optional<WeightScheme> scheme_;
  std::vector<std::int64_t> sizes_;  ///< of a frozen weight
  at::Device device_ = at::kCPU;
  at::Tensor latent_;
  std::mutex mutex_;
  std::shared_ptr<const WeightCodes> codes_;
  std::shared_ptr<const PackedWeight> packed_;
  std::optional<CacheKey> cached_for_;
  std::vector<Watched> watched_;
  bool has_unwatched_view_ = false;  ///< made under InferenceMode, where nothing counts versions
  bool lost_write_ = false;
  bool has_value_ = true;
};

}  // namespace quantal
