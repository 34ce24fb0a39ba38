#include "kernels/cpu/detect.h"

#include <gtest/gtest.h>

#if defined(__x86_64__)

namespace quantal::kernels {
namespace {

constexpr std::uint32_t bits(std::initializer_list<int> places) {
  std::uint32_t word = 0;
  for (const int place : places) word |= std::uint32_t{1} << place;
  return word;
}

// A processor with everything but AMX, under an operating system that saves all registers.
CpuFeatures everything() {
  return {.leaf1_ecx = bits({12, 27, 28, 29}),
          .leaf7_ebx = bits({5, 16, 17, 30, 31}),
          .leaf7_ecx = bits({1, 11}),
          .leaf7_1_eax = bits({4, 5}),
          .saved = 0b11100111};
}

TEST(Detect, finds_all_that_is_there) {
  EXPECT_EQ(isas_of(everything()),
            (std::vector<Isa>{Isa::kAvx512Bf16, Isa::kAvx512Vbmi, Isa::kAvx512Vnni, Isa::kAvx512,
                              Isa::kAvxVnni, Isa::kAvx2, Isa::kPortable}));
  EXPECT_EQ(isas_of({}), std::vector<Isa>{Isa::kPortable});
}

TEST(Detect, asks_for_the_registers_that_the_system_saves) {
  CpuFeatures cpu = everything();
  // Without opmasks, the upper halves of zmm0 to 15, or zmm16 to 31.
  for (const int place : {5, 6, 7}) {
    cpu.saved = 0b11100111 & ~bits({place});
    EXPECT_EQ(isas_of(cpu), (std::vector<Isa>{Isa::kAvxVnni, Isa::kAvx2, Isa::kPortable})) << place;
  }
  // Without the upper halves of ymm, or without any.
  for (const std::uint64_t saved : {0b11100011, 0b00000011, 0}) {
    cpu.saved = saved;
    EXPECT_EQ(isas_of(cpu), std::vector<Isa>{Isa::kPortable}) << saved;
  }
}

TEST(Detect, asks_for_every_part_of_an_instruction_set) {
  for (const int place : {12, 28, 29}) {
    CpuFeatures cpu = everything();
    cpu.leaf1_ecx &= ~bits({place});
    EXPECT_EQ(isas_of(cpu).size(), 1) << place;
  }
  for (const int place : {16, 17, 30, 31}) {
    CpuFeatures cpu = everything();
    cpu.leaf7_ebx &= ~bits({place});
    EXPECT_EQ(isas_of(cpu).front(), Isa::kAvxVnni) << place;
  }
  CpuFeatures without_vnni = everything();
  without_vnni.leaf7_ecx &= ~bits({11});
  EXPECT_EQ(isas_of(without_vnni).front(), Isa::kAvx512);
  CpuFeatures without_vbmi = everything();
  without_vbmi.leaf7_ecx &= ~bits({1});
  EXPECT_EQ(isas_of(without_vbmi).front(), Isa::kAvx512Vnni);
  CpuFeatures without_bf16 = everything();
  without_bf16.leaf7_1_eax &= ~bits({5});
  EXPECT_EQ(isas_of(without_bf16).front(), Isa::kAvx512Vbmi);
}

// And AMX, which the system lets the process use.
CpuFeatures everything_of_intel() {
  CpuFeatures cpu = everything();
  cpu.leaf7_edx = bits({22, 24, 25});
  cpu.is_intel = true;
  cpu.saved |= std::uint64_t{0b11} << 17;
  cpu.permits_tiles = true;
  return cpu;
}

TEST(Detect, finds_amx_where_all_of_it_may_be_used) {
  EXPECT_EQ(isas_of(everything_of_intel()),
            (std::vector<Isa>{Isa::kAmx, Isa::kAvx512Vbmi, Isa::kAvx512Bf16, Isa::kAvx512Vnni,
                              Isa::kAvx512, Isa::kAvxVnni, Isa::kAvx2, Isa::kPortable}));
  for (const int place : {22, 24, 25}) {
    CpuFeatures cpu = everything_of_intel();
    cpu.leaf7_edx &= ~bits({place});
    EXPECT_EQ(isas_of(cpu).front(), Isa::kAvx512Vbmi) << place;
  }
  for (const int place : {17, 18}) {
    CpuFeatures cpu = everything_of_intel();
    cpu.saved &= ~(std::uint64_t{1} << place);
    EXPECT_EQ(isas_of(cpu).front(), Isa::kAvx512Vbmi) << place;
  }
  CpuFeatures refused = everything_of_intel();
  refused.permits_tiles = false;
  EXPECT_EQ(isas_of(refused).front(), Isa::kAvx512Vbmi);
  CpuFeatures without_bf16 = everything_of_intel();
  without_bf16.leaf7_1_eax &= ~bits({5});
  EXPECT_EQ(isas_of(without_bf16).front(), Isa::kAvx512Vbmi);
}

TEST(Detect, puts_fp32_before_bf16_where_that_is_slower) {
  CpuFeatures intel = everything();
  EXPECT_TRUE(multiplies_bf16_fast(intel));
  intel.is_intel = true;
  EXPECT_FALSE(multiplies_bf16_fast(intel));
  const std::vector<Isa> found = isas_of(intel);
  EXPECT_EQ(std::vector<Isa>(found.begin(), found.begin() + 3),
            (std::vector<Isa>{Isa::kAvx512Vbmi, Isa::kAvx512Bf16, Isa::kAvx512Vnni}));
  // AMX, once the system saves its tiles and lets the process use them.
  intel.leaf7_edx = bits({22, 24});
  EXPECT_FALSE(multiplies_bf16_fast(intel));
  intel.saved |= std::uint64_t{0b11} << 17;
  EXPECT_FALSE(multiplies_bf16_fast(intel));
  intel.permits_tiles = true;
  EXPECT_TRUE(multiplies_bf16_fast(intel));
  CpuFeatures without_bf16 = everything();
  without_bf16.leaf7_1_eax &= ~bits({5});
  EXPECT_FALSE(multiplies_bf16_fast(without_bf16));
}

}  // namespace
}  // namespace quantal::kernels

#endif
