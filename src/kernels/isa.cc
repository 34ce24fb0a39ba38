#include <quantal/isa.h>

#include <cstdint>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels/cpu/neon/detect.h"

namespace quantal {
namespace {

struct Row {
  Isa isa;
  const char* name;
};
constexpr Row kIsas[] = {{Isa::kAvx2, "avx2"},
                         {Isa::kNeonI8mm, "neon_i8mm"},
                         {Isa::kNeonDotprod, "neon_dotprod"},
                         {Isa::kNeon, "neon"},
                         {Isa::kPortable, "portable"}};

#if defined(__x86_64__)

bool has(std::uint32_t word, int bit) { return (word >> bit & 1U) != 0; }

// The registers that the operating system saves: an instruction set is usable only with those.
std::uint64_t saved_state() {
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<std::uint64_t>(high) << 32 | low;
}

bool runs_avx2() {
  constexpr int kFma = 12, kOsxsave = 27, kAvx = 28, kF16c = 29, kAvx2 = 5;
  constexpr std::uint64_t kXmmAndYmm = 0b110;
  std::uint32_t a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return false;
  const bool first = has(c, kFma) && has(c, kOsxsave) && has(c, kAvx) && has(c, kF16c);
  if (!first || (saved_state() & kXmmAndYmm) != kXmmAndYmm) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && has(b, kAvx2);
}

#else

bool runs_avx2() { return false; }

#endif

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
  static const std::vector<Isa> isas = [] {
    std::vector<Isa> found = kernels::detect_neon();
    if (runs_avx2()) found.push_back(Isa::kAvx2);
    found.push_back(Isa::kPortable);
    return found;
  }();
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
