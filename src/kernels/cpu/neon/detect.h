#pragma once

#include <vector>

#include <quantal/isa.h>

namespace quantal::kernels {

/// The NEON instruction sets that this processor and operating system can run, best first; none
/// where the library is for another processor.
std::vector<Isa> detect_neon();

}  // namespace quantal::kernels
