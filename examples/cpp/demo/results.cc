#include "results.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <system_error>

namespace demo {

void prepare_folder(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw std::runtime_error(folder.string() + ": cannot be made: " + error.message());
  const std::filesystem::path probe = folder / "results.json.partial";
  write_file(probe, "");
  std::filesystem::remove(probe, error);
}

void write_json(const std::vector<Result>& results, const std::filesystem::path& path) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const Result& result : results) {
    list.push_back({{"scheme", result.scheme},
                    {"accuracy", result.accuracy},
                    {"file_bytes", result.file_bytes},
                    {"ms_per_batch", result.ms_per_batch}});
  }
  write_file(path, list.dump(2) + "\n");
}

void write_file(const std::filesystem::path& path, const std::string& text) {
  const std::filesystem::path partial = path.string() + ".partial";
  std::ofstream out(partial, std::ios::binary);
  out << text;
  out.close();
  if (!out) {
    throw std::runtime_error(path.string() + ": cannot be written: " + std::strerror(errno));
  }
  std::filesystem::rename(partial, path);
}

}  // namespace demo
