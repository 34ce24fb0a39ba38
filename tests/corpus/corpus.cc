#include "corpus/corpus.h"

#include <algorithm>
#include <iterator>

namespace quantal::corpus {
namespace {

using std::string;

constexpr std::uint64_t k2To63 = std::uint64_t{1} << 63;

string times(std::size_t count, std::string_view text) {
  string out;
  for (std::size_t i = 0; i < count; ++i) out += text;
  return out;
}

string entry(string name, string dtype, string shape, string offsets, string more = "") {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
         ",\"data_offsets\":" + offsets + more + "}";
}

// A file of one tensor `t`, whose fields are given as JSON.
string one(string dtype, string shape, string offsets, std::size_t data_size, string more = "") {
  return file("{" + entry("t", dtype, shape, offsets, more) + "}", string(data_size, '\1'));
}

// A file whose __metadata__ is given as JSON.
string with_metadata(string metadata) { return file("{\"__metadata__\":" + metadata + "}"); }

// A file of two byte tensors, `a` and `b`, with these offsets.
string two(string a, string a_shape, string b, string b_shape, std::size_t data_size) {
  return file("{" + entry("a", "U8", a_shape, a) + "," + entry("b", "U8", b_shape, b) + "}",
              string(data_size, '\1'));
}

std::vector<Case> lengths() {
  return {
      {"01_empty", "", Errc::kHeaderTooSmall},
      {"02_seven_bytes", string(7, '\0'), Errc::kHeaderTooSmall},
      {"03_length_0", file(""), Errc::kHeaderTooSmall},
      {"04_past_file", file_of_length(100, "{}"), Errc::kInvalidHeaderLength, {}, "got 100"},
      {"04_past_file_by_1", file_of_length(3, "{}"), Errc::kInvalidHeaderLength, {}, "at most 2 "},
      {"05_length_2_63", file_of_length(k2To63, "{}"), Errc::kHeaderTooLarge},
      {"06_length_2_64_less_1", file_of_length(~0ull, "{}"), Errc::kHeaderTooLarge},
      {"07_length_wraps", file_of_length(~0ull - 7, "{}"), Errc::kHeaderTooLarge},
      {"08_over_limit", file_of_length(100'000'001, "{}"), Errc::kHeaderTooLarge, {}, "100000001"},
      {"08_at_limit", file_of_length(100'000'000, "{}"), Errc::kInvalidHeaderLength},
  };
}

std::vector<Case> texts() {
  const string plain = "{" + entry("t", "U8", "[1]", "[0,1]") + "}";
  return {
      {"09_bad_byte", file("{\"\xFF\":0}"), Errc::kInvalidUtf8},
      {"09_bad_byte_outside_string", file("{}\xFF"), Errc::kInvalidUtf8},
      {"10_overlong", file("{\"\xC0\x80\":0}"), Errc::kInvalidUtf8},
      {"10_overlong_3", file("{\"\xE0\x80\x80\":0}"), Errc::kInvalidUtf8},
      {"10_surrogate", file("{\"\xED\xA0\x80\":0}"), Errc::kInvalidUtf8},
      {"10_past_unicode", file("{\"\xF4\x90\x80\x80\":0}"), Errc::kInvalidUtf8},
      {"10_cut_sequence", file("{\"\xE2\x82"), Errc::kInvalidUtf8},
      {"11_byte_order_mark", file("\xEF\xBB\xBF{}"), Errc::kInvalidJson, {}, "byte order mark"},
      {"12_cut_json", file("{\"t\":{\"dtype\""), Errc::kInvalidJson},
      {"13_array", file("[]"), Errc::kInvalidJson},
      {"14_null", file("null"), Errc::kInvalidJson},
      {"14_number", file("1"), Errc::kInvalidJson},
      {"14_only_spaces", file("    "), Errc::kInvalidJson},
      {"15_leading_space", file(" \n" + plain, "x"), Errc::kOk},
      {"16_nul_padding", file(plain + string(3, '\0'), "x"), Errc::kInvalidJson, {}, "with spaces"},
      {"17_space_padding", file(plain + "   ", "x"), Errc::kOk},
      {"18_other_padding", file(plain + "\n\t\r", "x"), Errc::kOk},
      {"19_two_values", file("{}{}"), Errc::kInvalidJson},
      {"19_comma_after", file("{},"), Errc::kInvalidJson},
      {"20_deep_metadata", with_metadata("{\"k\":" + times(10'000, "[")), Errc::kDepthExceeded},
      {"21_deep_value", file("{\"t\":" + times(1'000'000, "[")), Errc::kDepthExceeded},
      {"21_deep_objects", file(times(1'000'000, "{\"t\":")), Errc::kDepthExceeded},
      {"21_depth_8", one("U8", "[1]", "[0,1]", 1, ",\"x\":[[[[[[0]]]]]]"), Errc::kOk},
      {"21_depth_9", one("U8", "[1]", "[0,1]", 1, ",\"x\":[[[[[[[0]]]]]]]"), Errc::kDepthExceeded},
      {"70_lone_surrogate", file("{\"\\ud800\":0}"), Errc::kInvalidJson},
      {"71_nan", one("U8", "[NaN]", "[0,1]", 1), Errc::kInvalidJson},
      {"75_control_character", file("{\"a\x01\":0}"), Errc::kInvalidJson},
      {"75_comment", file("{/**/}"), Errc::kInvalidJson},
      {"75_trailing_comma", file("{" + entry("t", "U8", "[0]", "[0,0]") + ",}"),
       Errc::kInvalidJson},
      {"75_single_quotes", file("{'a':0}"), Errc::kInvalidJson},
      {"75_huge_number", one("U8", "[1e999]", "[0,1]", 1), Errc::kInvalidJson},
  };
}

std::vector<Case> keys() {
  const string t = entry("t", "F32", "[1]", "[0,4]");
  const string field = ",\"x\":0";
  return {
      {"22_twice_other_offsets",
       file("{" + t + "," + entry("t", "F32", "[1]", "[4,8]") + "}", "01234567"),
       Errc::kDuplicateKey,
       {},
       "tensor 't'"},
      {"23_twice_other_dtype",
       file("{" + t + "," + entry("t", "I32", "[1]", "[0,4]") + "}", "0123"), Errc::kDuplicateKey},
      {"24_metadata_twice", file("{\"__metadata__\":{},\"__metadata__\":{}}"), Errc::kDuplicateKey},
      {"24_metadata_null_twice", file("{\"__metadata__\":null,\"__metadata__\":{}}"),
       Errc::kDuplicateKey},
      {"25_in_metadata",
       with_metadata("{\"k\":\"1\",\"k\":\"2\"}"),
       Errc::kDuplicateKey,
       {},
       "'k'"},
      {"26_field_twice", one("F32", "[1]", "[0,4]", 4, ",\"shape\":[1]"), Errc::kDuplicateKey},
      {"26_unknown_twice", one("F32", "[1]", "[0,4]", 4, field + field), Errc::kDuplicateKey},
      {"26_in_unknown", one("F32", "[1]", "[0,4]", 4, ",\"x\":[{\"a\":{},\"b\":1,\"a\":1}]"),
       Errc::kDuplicateKey},
      {"27_by_escape",
       file("{" + t + "," + entry("\\u0074", "F32", "[1]", "[4,8]") + "}", "01234567"),
       Errc::kDuplicateKey},
      {"27_metadata_by_escape", with_metadata("{\"k\":\"1\",\"\\u006b\":\"2\"}"),
       Errc::kDuplicateKey},
      {"28_metadata_int", with_metadata("{\"k\":1}"), Errc::kInvalidJson},
      {"28_metadata_null_value", with_metadata("{\"k\":null}"), Errc::kInvalidJson},
      {"29_metadata_null", with_metadata("null"), Errc::kOk},
      {"30_metadata_list_value", with_metadata("{\"k\":[\"v\"]}"), Errc::kInvalidJson},
      {"30_metadata_list", with_metadata("[]"), Errc::kInvalidJson},
      {"31_unknown_field", one("F32", "[1]", "[0,4]", 4, field), Errc::kOk},
      {"32_no_shape", file("{\"t\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", "x"),
       Errc::kInvalidJson},
      {"32_no_dtype", file("{\"t\":{\"shape\":[1],\"data_offsets\":[0,1]}}", "x"),
       Errc::kInvalidJson},
      {"32_no_offsets", file("{\"t\":{\"dtype\":\"U8\",\"shape\":[0]}}"), Errc::kInvalidJson},
      {"32_tensor_null", file("{\"t\":null}"), Errc::kInvalidJson},
      {"32_tensor_string", file("{\"t\":\"U8\"}"), Errc::kInvalidJson},
      {"72_tensor_named_metadata",
       file("{" + entry("__metadata__", "U8", "[1]", "[0,1]") + "}", "x"), Errc::kInvalidJson},
  };
}

std::vector<Case> shapes() {
  const string kTwo64 = "18446744073709551616", kTwo63 = "9223372036854775808";
  const string ones = "[1" + times(63, ",1");
  return {
      {"33_unknown_dtype", one("F128", "[1]", "[0,16]", 16), Errc::kUnsupportedDtype, {}, "'F128'"},
      {"34_lower_case", one("f32", "[1]", "[0,4]", 4), Errc::kUnsupportedDtype},
      {"35_dtype_number", file("{\"t\":{\"dtype\":1,\"shape\":[0],\"data_offsets\":[0,0]}}"),
       Errc::kUnsupportedDtype},
      {"35_dtype_list", file("{\"t\":{\"dtype\":[\"U8\"],\"shape\":[0],\"data_offsets\":[0,0]}}"),
       Errc::kUnsupportedDtype},
      {"36_negative", one("U8", "[-1]", "[0,1]", 1), Errc::kInvalidShape},
      {"37_fraction", one("U8", "[1.0]", "[0,1]", 1), Errc::kInvalidShape},
      {"38_exponent", one("U8", "[1e0]", "[0,1]", 1), Errc::kInvalidShape},
      {"39_2_64", one("U8", "[" + kTwo64 + "]", "[0,1]", 1), Errc::kInvalidShape},
      {"77_leading_zero", one("U8", "[01]", "[0,1]", 1), Errc::kInvalidJson},
      {"78_minus_zero", one("U8", "[-0]", "[0,0]", 0), Errc::kInvalidShape},
      {"39_bool_dim", one("U8", "[true]", "[0,1]", 1), Errc::kInvalidJson},
      {"39_string_dim", one("U8", "[\"1\"]", "[0,1]", 1), Errc::kInvalidJson},
      {"39_nested_dim", one("U8", "[[1]]", "[0,1]", 1), Errc::kInvalidJson},
      {"39_shape_number", one("U8", "1", "[0,1]", 1), Errc::kInvalidJson},
      {"40_product_wraps", one("U8", "[8589934592,2147483648]", "[0,0]", 0), Errc::kInvalidShape},
      {"41_bytes_wrap", one("F64", "[2305843009213693952]", "[0,0]", 0), Errc::kInvalidShape},
      {"41_bits_wrap", one("F4", "[4611686018427387904,4]", "[0,0]", 0), Errc::kInvalidShape},
      {"42_zero_first", one("U8", "[0," + kTwo63 + "," + kTwo63 + "]", "[0,0]", 0),
       Errc::kInvalidShape},
      {"42_zero_hides_product", one("U8", "[0,4611686018427387904,4]", "[0,0]", 0),
       Errc::kInvalidShape},
      {"43_zero_last", one("U8", "[" + kTwo63 + "," + kTwo63 + ",0]", "[0,0]", 0),
       Errc::kInvalidShape},
      {"44_empty", one("F32", "[2,0]", "[0,0]", 0), Errc::kOk},
      {"45_zero_and_2_64", one("U8", "[0,18446744073709551615]", "[0,0]", 0), Errc::kInvalidShape},
      {"45_zero_and_2_62", one("U8", "[0,4611686018427387904]", "[0,0]", 0), Errc::kOk},
      {"46_rank_0", one("F32", "[]", "[0,4]", 4), Errc::kOk},
      {"47_rank_64", one("U8", ones + "]", "[0,1]", 1), Errc::kOk},
      {"47_rank_65", one("U8", ones + ",1]", "[0,1]", 1), Errc::kInvalidShape},
      {"47_rank_1000", one("U8", "[1" + times(999, ",1") + "]", "[0,1]", 1), Errc::kInvalidShape},
      {"63_f4_odd", one("F4", "[3]", "[0,1]", 1), Errc::kSizeMismatch},
      {"63_f6_odd", one("F6_E2M3", "[3]", "[0,2]", 2), Errc::kSizeMismatch},
      {"64_f4_even", one("F4", "[4]", "[0,2]", 2), Errc::kOk},
      {"64_f6_whole", one("F6_E3M2", "[4]", "[0,3]", 3), Errc::kOk},
      {"65_bool_1", one("BOOL", "[2]", "[0,2]", 2), Errc::kOk},
      {"65_bool_2", file("{" + entry("t", "BOOL", "[2]", "[0,2]") + "}", "\1\2"), Errc::kOk,
       Errc::kInvalidData, "offset 1"},
      {"66_nan", file("{" + entry("t", "F32", "[1]", "[0,4]") + "}", "\xFF\xFF\xFF\x7F"),
       Errc::kOk},
      {"79_c64", one("C64", "[1]", "[0,8]", 8), Errc::kOk},
  };
}

std::vector<Case> offsets() {
  const string unaligned =
      "{" + entry("a", "U8", "[1]", "[0,1]") + "," + entry("b", "F32", "[1]", "[1,5]") + "}";
  return {
      {"48_reversed", one("U8", "[1]", "[1,0]", 1), Errc::kInvalidOffset},
      {"49_past_end", one("U8", "[2]", "[0,2]", 1), Errc::kInvalidOffset},
      {"50_three", one("U8", "[1]", "[0,1,1]", 1), Errc::kInvalidOffset},
      {"50_one", one("U8", "[1]", "[0]", 1), Errc::kInvalidOffset},
      {"50_not_a_list", one("U8", "[1]", "0", 1), Errc::kInvalidJson},
      {"50_strings", one("U8", "[1]", "[\"0\",\"1\"]", 1), Errc::kInvalidJson},
      {"51_negative", one("U8", "[1]", "[-1,0]", 1), Errc::kInvalidOffset},
      {"51_fraction", one("U8", "[1]", "[0.0,1.0]", 1), Errc::kInvalidOffset},
      {"52_overlap", two("[0,2]", "[2]", "[1,3]", "[2]", 3), Errc::kInvalidOffset, {}, "overlap"},
      {"53_same_bytes", two("[0,2]", "[2]", "[0,2]", "[2]", 2), Errc::kInvalidOffset},
      {"54_hole_between", two("[0,1]", "[1]", "[2,3]", "[1]", 3), Errc::kInvalidOffset, {}, "hole"},
      {"55_hole_first", one("U8", "[1]", "[1,2]", 2), Errc::kInvalidOffset, {}, "hole"},
      {"56_trailing",
       file("{" + entry("t", "U8", "[1]", "[0,1]") + "}", "xPK\3\4"),
       Errc::kInvalidOffset,
       {},
       "1 covered"},
      {"56_data_without_tensors", file("{}", "x"), Errc::kInvalidOffset},
      {"57_too_few_bytes", one("F32", "[2]", "[0,4]", 4), Errc::kSizeMismatch},
      {"58_too_many_bytes", one("F32", "[1]", "[0,8]", 8), Errc::kSizeMismatch},
      {"59_end_near_2_64", one("U8", "[1]", "[0,18446744073709551615]", 1), Errc::kInvalidOffset},
      {"59_both_near_2_64", one("U8", "[1]", "[18446744073709551614,18446744073709551615]", 1),
       Errc::kInvalidOffset},
      {"60_other_order", two("[2,4]", "[2]", "[0,2]", "[2]", 4), Errc::kOk},
      {"61_odd_offset", file(unaligned, "\1abcd"), Errc::kOk},
      {"62_odd_header", file(unaligned + " ", "\1abcd"), Errc::kOk},
      {"67_empty_name", file("{" + entry("", "U8", "[1]", "[0,1]") + "}", "x"), Errc::kOk},
      {"68_nul_in_name", file("{" + entry("a\\u0000b", "U8", "[1]", "[0,1]") + "}", "x"),
       Errc::kOk},
      {"69_path_in_name", file("{" + entry("../x", "U8", "[1]", "[0,1]") + "}", "x"), Errc::kOk},
      {"69_name_4096", file("{" + entry(string(4096, 'n'), "U8", "[1]", "[0,1]") + "}", "x"),
       Errc::kOk},
      {"69_name_4097", file("{" + entry(string(4097, 'n'), "U8", "[1]", "[0,1]") + "}", "x"),
       Errc::kLimitExceeded},
      {"73_empty_between",
       file("{" + entry("a", "U8", "[1]", "[0,1]") + "," + entry("b", "U8", "[0]", "[1,1]") + "," +
                entry("c", "U8", "[1]", "[1,2]") + "}",
            "xy"),
       Errc::kOk},
      {"73_empty_at_both_ends",
       file("{" + entry("z", "U8", "[0]", "[0,0]") + "," + entry("a", "U8", "[1]", "[0,1]") + "," +
                entry("b", "U8", "[0]", "[1,1]") + "}",
            "x"),
       Errc::kOk},
      {"74_empty_inside", two("[0,2]", "[2]", "[1,1]", "[0]", 2), Errc::kInvalidOffset},
      {"74_empty_past_end", one("U8", "[0]", "[1,1]", 0), Errc::kInvalidOffset},
      {"76_no_tensors", file("{}"), Errc::kOk},
  };
}

}  // namespace

std::string file_of_length(std::uint64_t length, std::string_view rest) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(length >> (8 * i) & 0xFF);
  return bytes += rest;
}

std::string file(std::string_view json, std::string_view data) {
  return file_of_length(json.size(), std::string(json) += data);
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (auto make : {lengths, texts, keys, shapes, offsets}) {
    std::vector<Case> some = make();
    std::move(some.begin(), some.end(), std::back_inserter(all));
  }
  return all;
}

std::vector<Case> seeds() {
  std::vector<Case> all;
  const std::vector<std::string> ids = {
      "21_depth_8",    "29_metadata_null", "44_empty",  "46_rank_0",      "60_other_order",
      "61_odd_offset", "64_f4_even",       "65_bool_1", "68_nul_in_name", "73_empty_between"};
  for (Case& c : cases()) {
    if (std::find(ids.begin(), ids.end(), c.id) != ids.end()) all.push_back(std::move(c));
  }
  all.push_back(
      {"metadata", with_metadata("{\"format\":\"pt\",\"k\\u00e9\":\"\xC3\xA9\"}"), Errc::kOk});
  return all;
}

}  // namespace quantal::corpus
