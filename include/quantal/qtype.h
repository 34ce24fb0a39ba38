#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include <quantal/api.h>

namespace quantal {

/// How one quantized value is stored. Free of torch.
enum class QTypeId : std::uint8_t {
  kInt2,
  kInt4,
  kInt8,
  kFloat8E4M3FN,
  kFloat8E4M3FNUZ,
  kFloat8E5M2,
};

/// A quantization type: a name, a width and the range of its codes.
///
/// 8-bit types are symmetric (`value = scale * code`); qint2 and qint4 are affine
/// (`value = scale * code - shift`, codes stored unsigned in [0, 2^bits - 1]).
/// `qmin` and `qmax` are the nominal signed range, the names are optimum-quanto's.
struct QType {
  QTypeId id;
  std::string_view name;
  int bits;
  bool is_floating_point;
  double qmin;
  double qmax;

  /// True where a code needs a shift beside its scale (qint2, qint4).
  constexpr bool is_affine() const { return bits < 8; }
  friend constexpr bool operator==(const QType& a, const QType& b) { return a.id == b.id; }
};

inline constexpr QType qint2{QTypeId::kInt2, "qint2", 2, false, -2, 1};
inline constexpr QType qint4{QTypeId::kInt4, "qint4", 4, false, -8, 7};
inline constexpr QType qint8{QTypeId::kInt8, "qint8", 8, false, -127, 127};
inline constexpr QType qfloat8_e4m3fn{QTypeId::kFloat8E4M3FN, "qfloat8_e4m3fn", 8, true, -448, 448};
inline constexpr QType qfloat8_e4m3fnuz{
    QTypeId::kFloat8E4M3FNUZ, "qfloat8_e4m3fnuz", 8, true, -240, 240};
inline constexpr QType qfloat8_e5m2{QTypeId::kFloat8E5M2, "qfloat8_e5m2", 8, true, -57344, 57344};
inline constexpr QType qfloat8 = qfloat8_e4m3fn;

/// Every qtype, narrowest first.
QUANTAL_API const std::vector<QType>& all_qtypes();

/// The qtype of this name ("qint8", "qfloat8", …), or nothing where there is none.
QUANTAL_API std::optional<QType> find_qtype(std::string_view name);

}  // namespace quantal
