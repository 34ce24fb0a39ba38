#pragma once

#include <quantal/qtype.h>

namespace quantal::kernels {

/// body.template operator()<qtype>(): the type of a weight as a constant of the compiler.
template <typename Body>
void for_qtype(QTypeId qtype, const Body& body) {
  switch (qtype) {
    case QTypeId::kInt2:
      return body.template operator()<QTypeId::kInt2>();
    case QTypeId::kInt4:
      return body.template operator()<QTypeId::kInt4>();
    case QTypeId::kInt8:
      return body.template operator()<QTypeId::kInt8>();
    case QTypeId::kFloat8E4M3FN:
      return body.template operator()<QTypeId::kFloat8E4M3FN>();
    case QTypeId::kFloat8E4M3FNUZ:
      return body.template operator()<QTypeId::kFloat8E4M3FNUZ>();
    case QTypeId::kFloat8E5M2:
      return body.template operator()<QTypeId::kFloat8E5M2>();
  }
}

}  // namespace quantal::kernels
