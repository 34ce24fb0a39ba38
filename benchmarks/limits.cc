// What can this machine do at most? Two limits bound every linear layer: how fast weights stream
// from memory, and how many multiply-adds the cores do. Both are measured here, to be read beside
// the layers' times. No torch, and whatever instruction sets the processor has.
#include <algorithm>
#include <array>
#include <barrier>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Keeps `value` and what led to it from being optimised away.
template <typename T>
void keep(const T& value) {
  __asm__ volatile("" : : "g"(&value) : "memory");
}

// The processors that this process may use. Which of them are threads of one core is not looked at:
// benchmarks/linear.py allows one a core.
std::vector<int> allowed_processors() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  std::vector<int> found;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return found;
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (CPU_ISSET(i, &allowed)) found.push_back(i);
  }
  return found;
}

void pin_to(int processor) {
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(processor, &only);
  sched_setaffinity(0, sizeof only, &only);
}

// The seconds that the slowest of `threads` pinned threads needs for work(thread).
double run_pinned(int threads, const std::function<void(int)>& work) {
  static const std::vector<int> processors = allowed_processors();
  std::barrier start(threads);
  std::vector<double> seconds(static_cast<std::size_t>(threads));
  std::vector<std::jthread> running;
  running.reserve(seconds.size());
  for (int id = 0; id < threads; ++id) {
    running.emplace_back([&, id] {
      const auto i = static_cast<std::size_t>(id);
      if (!processors.empty()) pin_to(processors[i % processors.size()]);
      start.arrive_and_wait();
      const double begin = seconds_now();
      work(id);
      seconds[i] = seconds_now() - begin;
    });
  }
  running.clear();
  return *std::max_element(seconds.begin(), seconds.end());
}

// ---- Reading memory.
// One linear stream over 4 KiB pages reaches only half of what the memory gives: the read-ahead of
// the processor stops at page ends. Huge pages, several streams a thread and prefetching help, and
// which of them helps how much differs between machines: so all are tried.

enum class Pages { kSmall, kHuge };

class RandomBytes {
 public:
  RandomBytes(std::size_t size, Pages pages) : size_(size) {
    void* mapped = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<std::byte*>(mapped);
    madvise(data_, size_, pages == Pages::kHuge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    fill();
  }
  ~RandomBytes() { munmap(data_, size_); }
  RandomBytes(const RandomBytes&) = delete;
  RandomBytes& operator=(const RandomBytes&) = delete;

  const std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  void fill() {
    std::uint64_t state = 88172645463325252U;
    auto* words = reinterpret_cast<std::uint64_t*>(data_);
    for (std::size_t i = 0; i < size_ / sizeof(std::uint64_t); ++i) {
      state ^= state << 13U;
      state ^= state >> 7U;
      state ^= state << 17U;
      words[i] = state;
    }
  }

  std::byte* data_;
  std::size_t size_;
};

struct ReadPattern {
  std::size_t streams = 1;
  std::size_t prefetch = 0;  // bytes ahead of each stream; 0: none
};

constexpr std::size_t kLine = 64,
                      kStep = 4 * kLine;  // bytes of a stream before the next one's turn

// Reads [begin, begin + size) once, in `streams` interleaved parts. Vector must be a type that the
// caller's target reads with one instruction.
template <typename Vector>
__attribute__((always_inline)) inline void read_all(const std::byte* begin, std::size_t size,
                                                    ReadPattern pattern) {
  const std::size_t part = size / pattern.streams / kStep * kStep;
  Vector sum[kStep / sizeof(Vector)] = {};
  for (std::size_t i = 0; i < part; i += kStep) {
    for (std::size_t s = 0; s < pattern.streams; ++s) {
      const std::byte* p = begin + s * part + i;
      if (pattern.prefetch != 0) {
        // The hint may point past the end: it never faults.
        for (std::size_t k = 0; k < kStep; k += kLine) __builtin_prefetch(p + pattern.prefetch + k);
      }
      const auto* vectors = reinterpret_cast<const Vector*>(p);
#pragma GCC unroll 16
      for (std::size_t k = 0; k < kStep / sizeof(Vector); ++k) sum[k] ^= vectors[k];
    }
  }
  keep(sum);
}

using Vector128 = std::uint64_t __attribute__((vector_size(16)));
void read_all__portable(const std::byte* begin, std::size_t size, ReadPattern pattern) {
  read_all<Vector128>(begin, size, pattern);
}

#if defined(__x86_64__)
using Vector256 = std::uint64_t __attribute__((vector_size(32)));
__attribute__((target("avx2"))) void read_all__avx2(const std::byte* begin, std::size_t size,
                                                    ReadPattern pattern) {
  read_all<Vector256>(begin, size, pattern);
}
using Vector512 = std::uint64_t __attribute__((vector_size(64)));
__attribute__((target("avx512f"))) void read_all__avx512(const std::byte* begin, std::size_t size,
                                                         ReadPattern pattern) {
  read_all<Vector512>(begin, size, pattern);
}
#endif

// ---- Multiplying and adding.
// Twelve independent accumulators hide the latency. The loops are assembly with fixed registers:
// compilers spill accumulators of such loops, and then measure the spills.

constexpr int kAccumulators = 12;

#if defined(__x86_64__)

#define QUANTAL_FOR_12(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
// Every register starts from zero: no infinities, no denormals.
#define QUANTAL_PEAK_LOOP(body)                                                                    \
  __asm__ volatile("vzeroall\n1:\n" body "dec %0\njnz 1b\nvzeroupper\n"                            \
                   : "+r"(count)                                                                   \
                   :                                                                               \
                   : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", \
                     "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")

#define QUANTAL_FMA_YMM(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n"
#define QUANTAL_FMA_ZMM(i) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #i "\n"
#define QUANTAL_MADDUBS_YMM(i)             \
  "vpmaddubsw %%ymm14, %%ymm15, %%ymm13\n" \
  "vpmaddwd %%ymm14, %%ymm13, %%ymm13\n"   \
  "vpaddd %%ymm13, %%ymm" #i ", %%ymm" #i "\n"
#define QUANTAL_MADDWD_YMM(i)            \
  "vpmaddwd %%ymm14, %%ymm15, %%ymm13\n" \
  "vpaddd %%ymm13, %%ymm" #i ", %%ymm" #i "\n"
#define QUANTAL_DPBUSD_YMM(i) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #i "\n"
#define QUANTAL_DPBUSD_ZMM(i) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #i "\n"
#define QUANTAL_DPBF16_ZMM(i) "vdpbf16ps %%zmm14, %%zmm15, %%zmm" #i "\n"

void fma__avx2(std::int64_t count) { QUANTAL_PEAK_LOOP(QUANTAL_FOR_12(QUANTAL_FMA_YMM)); }
void fma__avx512(std::int64_t count) { QUANTAL_PEAK_LOOP(QUANTAL_FOR_12(QUANTAL_FMA_ZMM)); }
void maddubs__avx2(std::int64_t count) { QUANTAL_PEAK_LOOP(QUANTAL_FOR_12(QUANTAL_MADDUBS_YMM)); }
void maddwd__avx2(std::int64_t count) { QUANTAL_PEAK_LOOP(QUANTAL_FOR_12(QUANTAL_MADDWD_YMM)); }
void dpbusd__avxvnni(std::int64_t count) { QUANTAL_PEAK_LOOP(QUANTAL_FOR_12(QUANTAL_DPBUSD_YMM)); }
void dpbusd__avx512vnni(std::int64_t count) {
  QUANTAL_PEAK_LOOP(QUANTAL_FOR_12(QUANTAL_DPBUSD_ZMM));
}
void dpbf16__avx512bf16(std::int64_t count) {
  QUANTAL_PEAK_LOOP(QUANTAL_FOR_12(QUANTAL_DPBF16_ZMM));
}

// Tiles of AMX: four of sums, three times each, since there are no more. A product takes as long as
// 32 of another kind.
constexpr int kTileSteps = 32;
#define QUANTAL_TILE_LOOP(product)                                                              \
  __asm__ volatile("ldtilecfg %1\n1:\n" product("0", "4", "6") product("1", "4", "7") product(  \
                       "2", "5", "6") product("3", "5", "7") product("0", "4", "6")             \
                       product("1", "4", "7") product("2", "5", "6") product("3", "5", "7")     \
                           product("0", "4", "6") product("1", "4", "7") product("2", "5", "6") \
                               product("3", "5", "7") "dec %0\njnz 1b\ntilerelease\n"           \
                   : "+r"(count)                                                                \
                   : "m"(kTileShape)                                                            \
                   : "cc")
#define QUANTAL_DPBUSD_TILE(sums, x, y) "tdpbusd %%tmm" y ", %%tmm" x ", %%tmm" sums "\n"
#define QUANTAL_DPBF16_TILE(sums, x, y) "tdpbf16ps %%tmm" y ", %%tmm" x ", %%tmm" sums "\n"

// Palette 1; 64 bytes in each of 16 rows of 8 tiles.
constexpr auto kTileShape = [] {
  std::array<std::uint8_t, 64> shape{1};
  for (std::size_t i = 0; i < 8; ++i) shape[16 + 2 * i] = 64, shape[48 + i] = 16;
  return shape;
}();

void dpbusd__amx(std::int64_t count) {
  count = std::max<std::int64_t>(1, count / kTileSteps);
  QUANTAL_TILE_LOOP(QUANTAL_DPBUSD_TILE);
}
void dpbf16__amx(std::int64_t count) {
  count = std::max<std::int64_t>(1, count / kTileSteps);
  QUANTAL_TILE_LOOP(QUANTAL_DPBF16_TILE);
}

// Whether the system lets this process use tiles, for which it must be asked.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#endif

// What the compiler makes of a multiply-add where nothing is known of the processor.
using FloatVector = float __attribute__((vector_size(16)));
void multiply_add__portable(std::int64_t count) {
  FloatVector sums[kAccumulators] = {}, x = {}, y = {};
  __asm__ volatile("" : "+m"(x), "+m"(y));
  for (std::int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 12
    for (FloatVector& sum : sums) sum = sum * x + y;
  }
  keep(sums);
}

// ---- Which of them this processor runs.

enum class Isa { kPortable, kAvx2, kAvx512 };

struct Reader {
  Isa isa;
  const char* name;
  void (*run)(const std::byte* begin, std::size_t size, ReadPattern pattern);
};

struct Peak {
  Isa isa;
  const char* name;
  const char* unit;
  double ops;  // multiplications and additions of one accumulator's step
  void (*run)(std::int64_t count);
  bool present;
};

std::vector<Reader> readers() {
  std::vector<Reader> found = {{Isa::kPortable, "portable", read_all__portable}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) found.push_back({Isa::kAvx2, "avx2", read_all__avx2});
  if (__builtin_cpu_supports("avx512f"))
    found.push_back({Isa::kAvx512, "avx512", read_all__avx512});
#endif
  return found;
}

std::vector<Peak> peaks() {
  std::vector<Peak> found = {{Isa::kPortable, "fp32 multiply + add, portable", "GFLOP/s", 8,
                              multiply_add__portable, true}};
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f");
  const bool vnni256 = __builtin_cpu_supports("avxvnni");
  const bool vnni512 = __builtin_cpu_supports("avx512vnni");
  const bool bf16 = __builtin_cpu_supports("avx512bf16");
  const bool amx = avx512 && may_use_tiles();
  const std::initializer_list<Peak> x86 = {
      {Isa::kAvx2, "fp32 fma, ymm", "GFLOP/s", 16, fma__avx2, avx2},
      {Isa::kAvx2, "int8 maddubs + madd + add, ymm", "GOP/s", 64, maddubs__avx2, avx2},
      {Isa::kAvx2, "int16 madd + add, ymm", "GOP/s", 32, maddwd__avx2, avx2},
      {Isa::kAvx2, "int8 dpbusd, ymm", "GOP/s", 64, dpbusd__avxvnni, vnni256},
      {Isa::kAvx512, "fp32 fma, zmm", "GFLOP/s", 32, fma__avx512, avx512},
      {Isa::kAvx512, "int8 dpbusd, zmm", "GOP/s", 128, dpbusd__avx512vnni, vnni512},
      {Isa::kAvx512, "bf16 dpbf16, zmm", "GFLOP/s", 64, dpbf16__avx512bf16, bf16},
      {Isa::kAvx512, "int8 tdpbusd, tiles", "GOP/s", 32768.0 / kTileSteps, dpbusd__amx, amx},
      {Isa::kAvx512, "bf16 tdpbf16ps, tiles", "GFLOP/s", 16384.0 / kTileSteps, dpbf16__amx, amx},
  };
  std::copy_if(x86.begin(), x86.end(), std::back_inserter(found),
               [](const Peak& peak) { return peak.present; });
#endif
  return found;
}

// ---- Measuring.

struct Options {
  int threads = 2;
  int repeats = 5;
  std::size_t mebibytes = 512;
  std::int64_t steps = 20'000'000;
  Isa isa = Isa::kAvx512;
  std::string json_file;
};

double best_of(int repeats, const std::function<double()>& seconds) {
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < repeats; ++i) best = std::min(best, seconds());
  return best;
}

std::vector<int> thread_counts(int most) {
  return most > 1 ? std::vector{1, most} : std::vector{1};
}

nlohmann::json measure_reading(const Options& options) {
  Reader reader = readers().front();
  for (const Reader& each : readers()) {
    if (each.isa <= options.isa) reader = each;
  }
  nlohmann::json results = nlohmann::json::array();
  std::printf("Reading %zu MiB, GB/s (%s loads)\n", options.mebibytes, reader.name);
  std::printf("%8s %6s %8s %10s %8s\n", "threads", "pages", "streams", "prefetch", "GB/s");
  for (const Pages pages : {Pages::kSmall, Pages::kHuge}) {
    const char* pages_name = pages == Pages::kHuge ? "huge" : "4 KiB";
    const RandomBytes bytes(options.mebibytes * kMiB, pages);
    for (const int threads : thread_counts(options.threads)) {
      const std::size_t part = bytes.size() / static_cast<std::size_t>(threads) / kStep * kStep;
      for (const std::size_t streams : {1, 2, 4, 8}) {
        for (const std::size_t prefetch : {0, 1024, 2048, 4096}) {
          const auto work = [&](int id) {
            reader.run(bytes.data() + static_cast<std::size_t>(id) * part, part,
                       {.streams = streams, .prefetch = prefetch});
          };
          const double seconds =
              best_of(options.repeats, [&] { return run_pinned(threads, work); });
          const double gbps = static_cast<double>(part) * threads / seconds / 1e9;
          std::printf("%8d %6s %8zu %10zu %8.1f\n", threads, pages_name, streams, prefetch, gbps);
          results.push_back({{"threads", threads},
                             {"pages", pages_name},
                             {"streams", streams},
                             {"prefetch", prefetch},
                             {"gbps", gbps}});
        }
      }
    }
  }
  return results;
}

nlohmann::json measure_peaks(const Options& options) {
  nlohmann::json results = nlohmann::json::array();
  std::printf("\n%-32s %8s %10s\n", "Peak", "threads", "");
  for (const Peak& peak : peaks()) {
    if (peak.isa > options.isa) continue;
    for (const int threads : thread_counts(options.threads)) {
      const auto work = [&](int) { peak.run(options.steps); };
      const double seconds = best_of(options.repeats, [&] { return run_pinned(threads, work); });
      const double giga =
          peak.ops * kAccumulators * static_cast<double>(options.steps) * threads / seconds / 1e9;
      std::printf("%-32s %8d %10.0f %s\n", peak.name, threads, giga, peak.unit);
      results.push_back(
          {{"name", peak.name}, {"threads", threads}, {"giga", giga}, {"unit", peak.unit}});
    }
  }
  return results;
}

double best_read(const nlohmann::json& readings) {
  double best = 0;
  for (const auto& reading : readings) best = std::max(best, reading["gbps"].get<double>());
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  bool quick = false;
  CLI::App app("Measures the limits of this machine: memory reads and multiply-adds a second.");
  app.add_option("--threads", options.threads, "Measure with one thread and with this many")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--isa", options.isa, "Widest instruction set to use")
      ->transform(CLI::CheckedTransformer(
          std::vector<std::pair<std::string, Isa>>{
              {"portable", Isa::kPortable}, {"avx2", Isa::kAvx2}, {"avx512", Isa::kAvx512}},
          CLI::ignore_case));
  app.add_option("--json", options.json_file, "Write the results to this file, too");
  app.add_flag("--quick", quick, "A small buffer and few repeats: to see that it runs");
  CLI11_PARSE(app, argc, argv);
  if (quick) {
    options.repeats = 1;
    options.mebibytes = 64;
    options.steps = 1'000'000;
  }

  const nlohmann::json readings = measure_reading(options);
  const nlohmann::json multiplications = measure_peaks(options);
  std::printf("\nBest read: %.1f GB/s\n", best_read(readings));
  if (options.json_file.empty()) return 0;
  std::ofstream file(options.json_file);
  file << nlohmann::json{{"threads", options.threads},
                         {"read_gbps", best_read(readings)},
                         {"reads", readings},
                         {"peaks", multiplications}}
              .dump(2)
       << '\n';
  return file.good() ? 0 : 1;
}
