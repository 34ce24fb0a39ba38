#pragma once

// The AVX-512 intrinsics that src/kernels/cpu/avx512 uses, on a processor without them: SIMDe's,
// and here, lane by lane, those that it lacks or that compute something else than the processor.

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

namespace quantal::kernels {
namespace {
namespace emulated {

/// The elements of a register.
template <typename T, typename Register>
auto lanes_of(Register value) {
  std::array<T, sizeof(Register) / sizeof(T)> lanes;
  std::memcpy(&lanes, &value, sizeof(value));
  return lanes;
}
template <typename Register, typename Lanes>
Register register_of(const Lanes& lanes) {
  static_assert(sizeof(Register) == sizeof(Lanes));
  Register value;
  std::memcpy(&value, &lanes, sizeof(value));
  return value;
}

template <typename Result, typename To, typename From, typename Register, typename F>
Result map(Register value, const F& f) {
  const auto from = lanes_of<From>(value);
  std::array<To, sizeof(Result) / sizeof(To)> to;
  for (std::size_t i = 0; i < to.size(); ++i) to[i] = static_cast<To>(f(from[i]));
  return register_of<Result>(to);
}

/// Only the lanes of the mask touch memory.
template <typename Result, typename T, typename Mask>
Result masked_load(Mask mask, const void* from) {
  std::array<T, sizeof(Result) / sizeof(T)> lanes{};
  for (std::size_t i = 0; i < lanes.size(); ++i) {
    if (mask >> i & 1) std::memcpy(&lanes[i], static_cast<const T*>(from) + i, sizeof(T));
  }
  return register_of<Result>(lanes);
}
template <typename T, typename Mask, typename Register>
void masked_store(void* to, Mask mask, Register value) {
  const auto lanes = lanes_of<T>(value);
  for (std::size_t i = 0; i < lanes.size(); ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<T*>(to) + i, &lanes[i], sizeof(T));
  }
}

inline __m512 maskz_loadu_ps(__mmask16 mask, const void* from) {
  return masked_load<__m512, float>(mask, from);
}
inline __m256i maskz_loadu_epi16_256(__mmask16 mask, const void* from) {
  return masked_load<__m256i, std::uint16_t>(mask, from);
}
inline __m512i maskz_loadu_epi16(__mmask32 mask, const void* from) {
  return masked_load<__m512i, std::uint16_t>(mask, from);
}
inline void mask_storeu_ps(void* to, __mmask16 mask, __m512 value) {
  masked_store<float>(to, mask, value);
}
inline void mask_storeu_epi16_256(void* to, __mmask16 mask, __m256i value) {
  masked_store<std::uint16_t>(to, mask, value);
}
inline void mask_storeu_epi16(void* to, __mmask32 mask, __m512i value) {
  masked_store<std::uint16_t>(to, mask, value);
}
inline void mask_storeu_epi8_128(void* to, __mmask16 mask, __m128i value) {
  masked_store<std::uint8_t>(to, mask, value);
}

inline __m512 cvtepi32_ps(__m512i value) {
  return map<__m512, float, std::int32_t>(value, [](std::int32_t x) { return x; });
}
inline __m512i cvtps_epi32(__m512 value) {
  return map<__m512i, std::int32_t, float>(value, [](float x) { return std::nearbyint(x); });
}
inline __m128i cvtepi32_epi8(__m512i value) {
  return map<__m128i, std::int8_t, std::int32_t>(value, [](std::int32_t x) { return x; });
}
inline __m256i cvtepi32_epi16(__m512i value) {
  return map<__m256i, std::int16_t, std::int32_t>(value, [](std::int32_t x) { return x; });
}
inline __m512i cvtepi8_epi32(__m128i value) {
  return map<__m512i, std::int32_t, std::int8_t>(value, [](std::int8_t x) { return x; });
}
inline __m512i cvtepu8_epi32(__m128i value) {
  return map<__m512i, std::uint32_t, std::uint8_t>(value, [](std::uint8_t x) { return x; });
}
inline __m512i cvtepu16_epi32(__m256i value) {
  return map<__m512i, std::uint32_t, std::uint16_t>(value, [](std::uint16_t x) { return x; });
}
inline __m512i srai_epi32(__m512i value, int count) {
  return map<__m512i, std::int32_t, std::int32_t>(value,
                                                  [=](std::int32_t x) { return x >> count; });
}
inline __m512 cvtph_ps(__m256i value) {
  const auto lanes = lanes_of<__m128i>(value);
  return register_of<__m512>(std::array{_mm256_cvtph_ps(lanes[0]), _mm256_cvtph_ps(lanes[1])});
}
inline __m256i cvtps_ph(__m512 value) {
  const auto lanes = lanes_of<__m256>(value);
  return register_of<__m256i>(std::array{_mm256_cvtps_ph(lanes[0], _MM_FROUND_TO_NEAREST_INT),
                                         _mm256_cvtps_ph(lanes[1], _MM_FROUND_TO_NEAREST_INT)});
}
inline __m256 extractf32x8_ps(__m512 value, int index) { return lanes_of<__m256>(value)[index]; }
inline float reduce_add_ps(__m512 value) {
  std::array<float, 16> x = lanes_of<float>(value);
  for (int n = 8; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  }
  return x[0];
}
inline std::int32_t reduce_max_epi32(__m512i value) {
  const auto x = lanes_of<std::int32_t>(value);
  std::int32_t most = x[0];
  for (const std::int32_t lane : x) most = lane > most ? lane : most;
  return most;
}

/// As the processor does: products of the odd pairs first, and denormal numbers are zeros. SIMDe
/// rounds products and sums of another order.
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? 0.0F : x; }
inline float bf16_lane(std::uint32_t high_bits) {
  float value;
  std::memcpy(&value, &high_bits, sizeof(value));
  return flushed(value);
}
inline __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  std::array<float, 16> s = lanes_of<float>(sum);
  const auto x = lanes_of<std::uint32_t>(a), y = lanes_of<std::uint32_t>(b);
  for (int i = 0; i < 16; ++i) {
    s[i] = flushed(std::fma(bf16_lane(x[i] & 0xFFFF0000), bf16_lane(y[i] & 0xFFFF0000), s[i]));
    s[i] = flushed(std::fma(bf16_lane(x[i] << 16), bf16_lane(y[i] << 16), s[i]));
  }
  return register_of<__m512>(s);
}
/// Denormal numbers are zeros here, too.
inline std::uint16_t to_bf16(float value) {
  std::uint32_t bits;
  value = flushed(value);
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  const auto upper = lanes_of<float>(high), lower = lanes_of<float>(low);
  std::array<std::uint16_t, 32> to;
  for (int i = 0; i < 16; ++i) to[i] = to_bf16(lower[i]), to[16 + i] = to_bf16(upper[i]);
  return register_of<__m512bh>(to);
}
}  // namespace emulated
}  // namespace
}  // namespace quantal::kernels

#undef _mm512_madd_epi16  // SIMDe's has the arguments of the masked one
#define _mm512_madd_epi16 simde_mm512_madd_epi16
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm256_maskz_loadu_epi16 emulated::maskz_loadu_epi16_256
#define _mm512_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm256_mask_storeu_epi16 emulated::mask_storeu_epi16_256
#define _mm512_mask_storeu_epi16 emulated::mask_storeu_epi16
#define _mm_mask_storeu_epi8 emulated::mask_storeu_epi8_128
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#undef _mm512_srai_epi32
#define _mm512_srai_epi32 emulated::srai_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph  // a macro where the compiler does not optimise
#define _mm512_cvtps_ph(value, rounding) emulated::cvtps_ph(value)
#undef _mm512_extractf32x8_ps  // a macro where the compiler does not optimise
#define _mm512_extractf32x8_ps emulated::extractf32x8_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_reduce_max_epi32 emulated::reduce_max_epi32
