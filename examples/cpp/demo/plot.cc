#include "plot.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <sstream>
#include <stdexcept>

namespace demo {
namespace {

// Okabe and Ito's colours, told apart by colour-blind readers too.
constexpr const char* kFloatColour = "0x555555";
constexpr const char* kWeightsColour = "0x0072B2";
constexpr const char* kActivationsColour = "0xE69F00";

// Three panels over the same rows: dots for accuracy, whose axis does not start at 0, bars for the
// others. The dashed line is float.
constexpr const char* kPanels = R"(
set style fill solid noborder
set border 3 lc rgb '#888888'
set tics nomirror
set xtics out textcolor rgb '#222222'
set ytics scale 0 textcolor rgb '#222222'
set grid xtics lc rgb '#dddddd' lt 1
set yrange [rows + 0.6 : 0.4]
unset key
set style textbox opaque noborder margins 0.3,0

set multiplot title heading font ',15'
set tmargin at screen 0.80
set bmargin at screen 0.19

set lmargin at screen 0.115
set rmargin at screen 0.385
set title "Accuracy, % of test images\n{/*0.85 higher is better, the axis does not start at 0}"
set xrange [low_accuracy : high_accuracy]
set arrow 1 from float_accuracy, graph 0 to float_accuracy, graph 1 nohead dt (20,12) lc rgb '#555555'
plot $results using 2:1:5:ytic(6) with points pt 7 ps 1.9 lc rgb variable, \
     '' using 2:1:7 with labels boxed offset 0,0.95

set format y ''
set lmargin at screen 0.415
set rmargin at screen 0.685
set title "File size, KiB\n{/*0.85 lower is better}"
set xrange [0 : high_kib]
set arrow 1 from float_kib, graph 0 to float_kib, graph 1 nohead dt (20,12) lc rgb '#555555'
plot $results using (0):1:(0):3:($1 - 0.32):($1 + 0.32):5 with boxxyerror lc rgb variable, \
     '' using 3:1:8 with labels left offset 0.7,0

set lmargin at screen 0.715
set rmargin at screen 0.985
set title "Time per batch, ms\n{/*0.85 lower is better}"
set xrange [0 : high_ms]
set arrow 1 from float_ms, graph 0 to float_ms, graph 1 nohead dt (20,12) lc rgb '#555555'
plot $results using (0):1:(0):4:($1 - 0.32):($1 + 0.32):5 with boxxyerror lc rgb variable, \
     '' using 4:1:9 with labels left offset 0.7,0
)";

// A legend of coloured squares under the panels.
constexpr const char* kLegend = R"(
unset arrow 1
unset title
unset border
unset tics
unset grid
set lmargin at screen 0
set rmargin at screen 1
set tmargin at screen 0.12
set bmargin at screen 0
set xrange [0:1]
set yrange [0:1]
set label 'qat: quantization-aware training, one epoch more than the others' \
  at screen 0.985, 0.025 right font ',9' textcolor rgb '#444444'
set key at screen 0.5, 0.075 center center horizontal reverse Left samplen 1 width 3
plot -1 notitle, \
     keyentry with points pt 5 ps 2 lc rgb float_colour title 'float (also the dashed line)', \
     keyentry with points pt 5 ps 2 lc rgb weights_colour title 'weights quantized', \
     keyentry with points pt 5 ps 2 lc rgb activations_colour title 'weights and activations quantized'
unset multiplot
)";

template <typename... Args>
std::string format(const char* pattern, Args... args) {
  std::array<char, 160> text{};
  std::snprintf(text.data(), text.size(), pattern, args...);
  return text.data();
}

// As gnuplot's single-quoted strings want it.
std::string quoted(const std::string& text) {
  std::string result = "'";
  for (const char c : text) result += c == '\'' ? std::string("''") : std::string(1, c);
  return result + "'";
}

double kib(const Result& result) { return static_cast<double>(result.file_bytes) / 1024; }

double milliseconds(const Result& result) { return result.ms_per_batch; }

// Leaves room for the label behind the longest bar.
double bar_axis_end(const std::vector<Result>& results, double (*value)(const Result&)) {
  double longest = 0;
  for (const Result& result : results) longest = std::max(longest, value(result));
  return longest * 1.45;
}

struct Range {
  double low;
  double high;
};

Range accuracy_axis(const std::vector<Result>& results) {
  const auto [low, high] =
      std::minmax_element(results.begin(), results.end(),
                          [](const Result& a, const Result& b) { return a.accuracy < b.accuracy; });
  const double margin = std::max(0.25, (high->accuracy - low->accuracy) / 4);
  return {low->accuracy - margin, high->accuracy + margin};
}

const char* colour_of(const Result& result) {
  if (result.scheme == "float") return kFloatColour;
  const bool activations = result.scheme.find('-') != std::string::npos;
  return activations ? kActivationsColour : kWeightsColour;
}

std::string script(const std::vector<Result>& results, const std::string& title,
                   const std::filesystem::path& path) {
  const Result& plain = results.front();
  const Range accuracies = accuracy_axis(results);
  std::ostringstream text;
  text << "set terminal pngcairo size 1400,560 font 'DejaVu Sans,11' background 'white'\n"
       << "set encoding utf8\n"
       << "set output " << quoted(path.string()) << "\n"
       << "heading = " << quoted(title) << "\n"
       << "rows = " << results.size() << "\n"
       << "low_accuracy = " << accuracies.low << "\n"
       << "high_accuracy = " << accuracies.high << "\n"
       << "high_kib = " << bar_axis_end(results, kib) << "\n"
       << "high_ms = " << bar_axis_end(results, milliseconds) << "\n"
       << "float_accuracy = " << plain.accuracy << "\n"
       << "float_kib = " << kib(plain) << "\n"
       << "float_ms = " << plain.ms_per_batch << "\n"
       << "float_colour = " << kFloatColour << "\n"
       << "weights_colour = " << kWeightsColour << "\n"
       << "activations_colour = " << kActivationsColour << "\n"
       << "$results << END\n"
       << "# row accuracy KiB ms colour scheme labels\n";
  for (size_t i = 0; i < results.size(); ++i) {
    const Result& r = results[i];
    text << i + 1 << ' ' << r.accuracy << ' ' << kib(r) << ' ' << r.ms_per_batch << ' '
         << colour_of(r) << " \"" << r.scheme << "\" \"" << format("%.2f", r.accuracy) << "\" \""
         << format("%.0f (×%.2f)", kib(r), kib(r) / kib(plain)) << "\" \""
         << format("%.1f (×%.2f)", r.ms_per_batch, r.ms_per_batch / plain.ms_per_batch) << "\"\n";
  }
  text << "END\n" << kPanels << kLegend;
  return text.str();
}

// Runs gnuplot with one argument; its exit code. std::runtime_error where it cannot be run.
int run_gnuplot(const std::string& argument) {
  std::string program = "gnuplot";
  std::string copy = argument;
  const std::array<char*, 3> arguments = {program.data(), copy.data(), nullptr};
  pid_t child = 0;
  const int error =
      posix_spawnp(&child, program.c_str(), nullptr, nullptr, arguments.data(), environ);
  if (error != 0) {
    throw std::runtime_error(std::string("gnuplot, which draws the plot, cannot be run: ") +
                             std::strerror(error) + ". Debian has it in the package gnuplot-nox");
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

void require_gnuplot() { run_gnuplot("/dev/null"); }

void draw_plot(const std::vector<Result>& results, const std::string& title,
               const std::filesystem::path& path) {
  std::filesystem::path script_path = path;
  script_path.replace_extension(".gnuplot");
  write_file(script_path, script(results, title, path));
  std::filesystem::remove(path);
  if (run_gnuplot(script_path.string()) != 0 || !std::filesystem::exists(path)) {
    throw std::runtime_error("gnuplot could not draw " + path.string() + " from " +
                             script_path.string());
  }
}

}  // namespace demo
