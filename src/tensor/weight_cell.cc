#include "tensor/weight_cell.h"

#include <ATen/ATen.h>

#include <cstring>

#include "ops/cpu_weights.h"

namespace quantal {
namespace {

// VariableVersion is one pointer to a shared counter, which it does not show.
bool is_same_counter(const c10::VariableVersion& a, const c10::VariableVersion& b) {
  static_assert(sizeof(c10::VariableVersion) == sizeof(void*));
  return std::memcmp(&a, &b, sizeof(a)) == 0;  // NOLINT(bugprone-suspicious-memory-comparison)
}

// Rows [begin, begin + count) of the float value. Few rows are decoded without the others.
at::Tensor decode_range(const WeightCodes& codes, std::int64_t begin, std::int64_t count,
                        at::ScalarType dtype) {
  if (count == codes.rows()) return dequantize(codes, dtype);
  if (2 * count > codes.rows()) return dequantize(codes, dtype).narrow(0, begin, count);
  const auto options = at::dtype(at::kLong).device(codes.data.device());
  return decode_rows(codes, at::arange(begin, begin + count, options), dtype);
}

}  // namespace

WeightCell::WeightCell(std::optional<WeightScheme> scheme, at::Tensor latent)
    : scheme_(std::move(scheme)), latent_(std::move(latent)) {}

WeightCell::WeightCell(std::optional<WeightScheme> scheme, std::shared_ptr<const WeightCodes> codes)
    : scheme_(std::move(scheme)),
      sizes_(codes->sizes),
      device_(codes->data.device()),
      codes_(std::move(codes)) {}

std::shared_ptr<WeightCell> WeightCell::without_value(at::IntArrayRef sizes, at::ScalarType dtype) {
  const at::Tensor nothing = at::empty(sizes, at::dtype(dtype).device(at::kMeta));
  auto cell = std::make_shared<WeightCell>(std::nullopt, nothing);
  cell->has_value_ = false;
  return cell;
}

const at::Tensor& WeightCell::latent() const {
  TORCH_CHECK(has_value_,
              "[quantal] a bound weight is for linear and convolution: its value is the module's");
  return latent_;
}

WeightCell::CacheKey WeightCell::cache_key() const {
  return {latent_._version(), latent_.const_data_ptr()};
}

void WeightCell::set_value(std::shared_ptr<const WeightCodes> codes) {
  codes_ = std::move(codes);
  packed_ = nullptr;
}

void WeightCell::update() {
  if (!live()) {
    lost_write_ = views_were_written() || lost_write_;
    TORCH_CHECK(!lost_write_, "[quantal] a view of a frozen weight of shape ", sizes(),
                " was written; frozen weights hold codes that such a write cannot change. Use "
                "copy_(), or write before freeze()");
    return;
  }
  const bool written = views_were_written() || has_unwatched_view_;
  if (!written && (codes_ || packed_) && cached_for_ == cache_key()) return;
  // The cache outlives an InferenceMode in which it is filled.
  c10::InferenceMode normal(false);
  at::AutoDispatchBelowADInplaceOrView below;
  const CacheKey key = cache_key();
  set_value(std::make_shared<const WeightCodes>(quantize(latent_, *scheme_)));
  cached_for_ = key;
}

std::shared_ptr<const WeightCodes> WeightCell::codes() {
  std::lock_guard lock(mutex_);
  update();
  return codes_ ? codes_ : std::make_shared<const WeightCodes>(packed_->codes());
}

std::shared_ptr<const WeightCodes> WeightCell::canonical() {
  std::lock_guard lock(mutex_);
  update();
  return codes_;
}

std::shared_ptr<const PackedWeight> WeightCell::packed() {
  std::lock_guard lock(mutex_);
  update();
  if (!packed_ && PackedWeight::takes(*codes_)) {
    packed_ = std::make_shared<const PackedWeight>(*codes_);
    codes_ = nullptr;
  }
  return packed_;
}

at::Tensor WeightCell::decode(std::int64_t begin, std::int64_t count, at::ScalarType dtype) {
  std::unique_lock lock(mutex_);
  update();
  const auto codes = codes_;
  const auto packed = packed_;
  lock.unlock();
  if (codes) return decode_range(*codes, begin, count, dtype);
  return packed->decode(begin, count, dtype);
}

at::Tensor WeightCell::decode_rows(const at::Tensor& indices, at::ScalarType dtype) {
  std::unique_lock lock(mutex_);
  update();
  const auto codes = codes_;
  const auto packed = packed_;
  lock.unlock();
  return packed ? packed->decode_rows(indices, dtype)
                : quantal::decode_rows(*codes, indices, dtype);
}

std::int64_t WeightCell::nbytes() {
  std::lock_guard lock(mutex_);
  update();
  return codes_ ? codes_->nbytes() : packed_->nbytes();
}

void WeightCell::freeze(std::shared_ptr<const WeightCodes> codes) {
  std::lock_guard lock(mutex_);
  sizes_ = codes->sizes;
  device_ = codes->data.device();
  set_value(std::move(codes));
  latent_ = at::Tensor();
  cached_for_.reset();
  views_were_written();
}

void WeightCell::replace_codes(std::shared_ptr<const WeightCodes> codes) {
  std::lock_guard lock(mutex_);
  set_value(std::move(codes));
  lost_write_ = false;
  // The operation moves the version after its kernel returned.
  for (Watched& watched : watched_) watched.seen.reset();
}

void WeightCell::seed_cache(std::shared_ptr<const WeightCodes> codes) {
  std::lock_guard lock(mutex_);
  set_value(std::move(codes));
  cached_for_ = cache_key();
}

void WeightCell::watch(const c10::VariableVersion& counter) {
  std::lock_guard lock(mutex_);
  if (!counter.enabled()) {
    has_unwatched_view_ = true;
    return;
  }
  for (const Watched& watched : watched_) {
    if (is_same_counter(watched.counter, counter)) return;
  }
  watched_.push_back({counter, counter.current_version()});
}

// Since it was last asked. Forgets counters that nobody else has any more.
bool WeightCell::views_were_written() {
  if (watched_.empty()) return false;
  bool written = false;
  std::vector<Watched> kept;
  for (Watched& watched : watched_) {
    const bool last = watched.counter.unique();
    const std::uint32_t version = watched.counter.current_version();
    written = written || version != watched.seen.value_or(version);
    watched.seen = version;
    if (!last) kept.push_back(std::move(watched));
  }
  watched_ = std::move(kept);
  return written;
}

}  // namespace quantal
