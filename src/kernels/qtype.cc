#include <quantal/qtype.h>

namespace quantal {

const std::vector<QType>& all_qtypes() {
  static const std::vector<QType> types = {
      qint2, qint4, qint8, qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2};
  return types;
}

std::optional<QType> find_qtype(std::string_view name) {
  if (name == "qfloat8") return qfloat8;
  for (const QType& type : all_qtypes()) {
    if (type.name == name) return type;
  }
  return std::nullopt;
}

}  // namespace quantal
