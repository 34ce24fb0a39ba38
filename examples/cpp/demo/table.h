#pragma once

#include <string>
#include <vector>

#include "results.h"

namespace demo {

/// The results as text, each beside float. Precondition: the first one is float.
std::string table(const std::vector<Result>& results);

}  // namespace demo
