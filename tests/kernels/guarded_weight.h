#pragma once

#include <algorithm>
#include <span>

#include "kernels/guarded_bytes.h"
#include "kernels/weights.h"

namespace quantal::kernels {

/// A weight in packed form, against a page without rights.
struct GuardedPacked {
  explicit GuardedPacked(const RandomWeight& weight, Edge edge = Edge::kLast)
      : layout(weight.spec), bytes(layout.size(), edge) {
    pack(layout, weight.canonical(), bytes.data());
  }
  const std::byte* data() const { return bytes.data(); }

  PackedLayout layout;
  GuardedBytes bytes;
};

/// A weight in canonical form, or room for one: each of its tensors against such a page.
class GuardedCanonical {
 public:
  explicit GuardedCanonical(const WeightSpec& spec, Edge edge = Edge::kLast,
                            std::int64_t distance = 0)
      : GuardedCanonical(spec, PackedLayout(spec), edge, distance) {}
  explicit GuardedCanonical(const RandomWeight& weight, Edge edge = Edge::kLast,
                            std::int64_t distance = 0)
      : GuardedCanonical(weight.spec, edge, distance) {
    std::ranges::copy(std::as_bytes(std::span(weight.data)), data_.data());
    std::ranges::copy(weight.scale, scale_.data());
    std::ranges::copy(weight.shift, shift_.data());
  }

  CanonicalWeight get() const { return {room().data, room().scale, room().shift}; }
  MutableCanonicalWeight room() const {
    return {reinterpret_cast<std::uint8_t*>(data_.data()), scale_.data(),
            is_affine_ ? shift_.data() : nullptr};
  }
  bool equals(const RandomWeight& weight) const {
    return std::ranges::equal(data_.span(), std::as_bytes(std::span(weight.data))) &&
           std::ranges::equal(scale_.span(), weight.scale) &&
           std::ranges::equal(shift_.span(), weight.shift);
  }

 private:
  GuardedCanonical(const WeightSpec& spec, const PackedLayout& layout, Edge edge,
                   std::int64_t distance)
      : is_affine_(layout.is_affine()),
        width_(size_of(spec.scale_type)),
        count_(spec.rows * layout.groups()),
        data_(canonical_data_size(spec), edge, distance),
        scale_(count_ * width_, edge, distance * width_),
        shift_(is_affine_ ? count_ * width_ : 0, edge, distance * width_) {}

  bool is_affine_;
  std::int64_t width_, count_;
  GuardedBytes data_, scale_, shift_;
};

}  // namespace quantal::kernels
