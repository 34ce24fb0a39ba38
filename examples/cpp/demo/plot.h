#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "results.h"

namespace demo {

/// std::runtime_error that says what to install where gnuplot cannot be run.
void require_gnuplot();

/// Draws accuracy, size and speed side by side to `path`, a PNG, and leaves the gnuplot script that
/// did it beside it. Precondition: the first result is float. std::runtime_error where gnuplot
/// fails.
void draw_plot(const std::vector<Result>& results, const std::string& title,
               const std::filesystem::path& path);

}  // namespace demo
