#include <quantal/isa.h>

#include <cstdlib>

#include "kernels/cpu/detect.h"

namespace quantal {
namespace {

struct Row {
  Isa isa;
  const char* name;
};
constexpr Row kIsas[] = {{Isa::kAmx, "amx"},
                         {Isa::kAvx512Bf16, "avx512_bf16"},
                         {Isa::kAvx512Vbmi, "avx512_vbmi"},
                         {Isa::kAvx512Vnni, "avx512_vnni"},
                         {Isa::kAvx512, "avx512"},
                         {Isa::kAvxVnni, "avx_vnni"},
                         {Isa::kAvx2, "avx2"},
                         {Isa::kNeonBf16, "neon_bf16"},
                         {Isa::kNeonI8mm, "neon_i8mm"},
                         {Isa::kNeonDotprod, "neon_dotprod"},
                         {Isa::kNeon, "neon"},
                         {Isa::kPortable, "portable"}};

std::string listed(const std::vector<Isa>& isas) {
  std::string text;
  for (const Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(isa_name(isa));
  return text;
}

}  // namespace

std::string_view isa_name(Isa isa) {
  for (const Row& row : kIsas) {
    if (row.isa == isa) return row.name;
  }
  return "unknown";
}

const std::vector<Isa>& supported_isas() {
  static const std::vector<Isa> isas = kernels::detect_isas();
  return isas;
}

Result<Isa> choose_isa(const char* name) {
  if (name == nullptr || *name == '\0') return supported_isas().front();
  for (const Isa isa : supported_isas()) {
    if (name == isa_name(isa)) return isa;
  }
  bool is_known = false;
  for (const Row& row : kIsas) is_known = is_known || std::string_view(row.name) == name;
  return Status(Errc::kInvalidArgument,
                "[quantal::active_isa] QUANTAL_ISA is '" + std::string(name) + "', " +
                    (is_known ? "which this processor cannot run" : "which is no instruction set") +
                    ": expected one of " + listed(supported_isas()));
}

Result<Isa> active_isa() {
  static const Result<Isa> choice = choose_isa(std::getenv("QUANTAL_ISA"));
  return choice;
}

}  // namespace quantal
