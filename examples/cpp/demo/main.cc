#include <c10/util/Exception.h>

#include <CLI/CLI.hpp>
#include <exception>
#include <iostream>

#include "demo.h"

namespace {

int fail(const std::string& message) {
  std::cerr << "quantal-demo: error: " << message << std::endl;
  return 1;
}

void add_options(CLI::App& app, demo::Options& options) {
  app.add_option("--data", options.data,
                 "Folder with the four IDX files of MNIST or a data set like it, plain or .gz")
      ->type_name("DIR")
      ->capture_default_str();
  app.add_option("--out", options.out, "Folder for the models, results.json and results.png")
      ->type_name("DIR")
      ->capture_default_str();
  app.add_option("--epochs", options.epochs, "Epochs to train in float")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app.add_option("--batch-size", options.batch_size, "Images a training step")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  app.add_option("--limit", options.limit,
                 "Use only the first N images of each part, for a quick run; 0: all")
      ->type_name("N")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--seed", options.seed, "Seed of initial weights and of the order of images")
      ->capture_default_str();
  app.add_option("--threads", options.threads, "Threads to compute with; 0: libtorch decides")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
}

}  // namespace

int main(int argc, char** argv) {
  demo::Options options;
  CLI::App app(
      "Trains a small network on images, quantizes it in several ways, and compares accuracy, file "
      "size and speed with float.",
      "quantal-demo");
  add_options(app, options);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 1;
  }
  try {
    demo::run(options);
  } catch (const c10::Error& error) {
    return fail(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return fail(error.what());
  }
  return 0;
}
