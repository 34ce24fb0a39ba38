// Links Quantal's torch-free libraries alone: prints the qtypes and reads a file that is none.
#include <iostream>
#include <memory>

#include <quantal/qtype.h>
#include <quantal/safetensors.h>

int main() {
  for (const quantal::QType& qtype : quantal::all_qtypes()) std::cout << qtype.name << ' ';
  const auto reader = quantal::safetensors::Reader::from_memory({});
  std::cout << quantal::errc_name(reader.status().code()) << '\n';
}
