#include "table.h"

#include <libsmartcols.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>

namespace demo {
namespace {

template <typename... Args>
std::string format(const char* pattern, Args... args) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), pattern, args...);
  return text.data();
}

std::vector<std::string> cells_of(const Result& result, const Result& plain) {
  const double size_ratio =
      static_cast<double>(result.file_bytes) / static_cast<double>(plain.file_bytes);
  return {result.scheme,
          format("%.2f", result.accuracy),
          format("%+.2f", result.accuracy - plain.accuracy),
          std::to_string(result.file_bytes),
          format("x %.2f", size_ratio),
          format("%.2f", result.ms_per_batch),
          format("x %.2f", result.ms_per_batch / plain.ms_per_batch)};
}

}  // namespace

std::string table(const std::vector<Result>& results) {
  const std::unique_ptr<libscols_table, decltype(&scols_unref_table)> table(scols_new_table(),
                                                                            scols_unref_table);
  if (!table) throw std::bad_alloc();
  // As wide as it is, wherever it is printed.
  scols_table_set_termforce(table.get(), SCOLS_TERMFORCE_NEVER);
  scols_table_new_column(table.get(), "SCHEME", 0, 0);
  for (const char* header :
       {"ACCURACY %", "VS FLOAT", "FILE BYTES", "VS FLOAT", "MS/BATCH", "VS FLOAT"}) {
    scols_table_new_column(table.get(), header, 0, SCOLS_FL_RIGHT);
  }
  for (const Result& result : results) {
    libscols_line* line = scols_table_new_line(table.get(), nullptr);
    if (line == nullptr) throw std::bad_alloc();
    const auto cells = cells_of(result, results.front());
    for (size_t i = 0; i < cells.size(); ++i) scols_line_set_data(line, i, cells[i].c_str());
  }
  char* text = nullptr;
  if (scols_print_table_to_string(table.get(), &text) != 0) throw std::bad_alloc();
  const std::unique_ptr<char, decltype(&std::free)> owner(text, std::free);
  return text;
}

}  // namespace demo
