#!/usr/bin/env bash
# Installs what benchmarks/linear.py measures Quantal against: Python packages in .venv-bench
# (benchmarks/requirements.txt) and ggml, compiled from llama-cpp-python's source package. What is
# there already is left alone; what cannot be had is said, and the benchmark skips it.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-bench
llama_cpp_python=0.3.36 # its source package carries llama.cpp
requirements=benchmarks/requirements.txt

say() { printf 'bench-setup: %s\n' "$*"; }

# Where one package is not to be had, the others are installed all the same.
install_python_packages() {
  local stamp=$venv/.requirements.sha256 torch package
  if sha256sum --check --status "$stamp" 2>/dev/null; then
    return
  fi
  [ -x $venv/bin/python ] || .venv/bin/python -m venv $venv
  # torch goes first and alone: one exact version, which the other packages then keep.
  torch=$(grep '^torch==' $requirements)
  say "installing Python packages into $venv: $torch"
  $venv/bin/python -m pip install --quiet "$torch"
  say "installing Python packages into $venv: the rest of $requirements"
  if $venv/bin/python -m pip install --quiet --only-binary=:all: --requirement $requirements; then
    sha256sum $requirements >"$stamp"
    return
  fi
  say "not all of it is to be had: installing one by one"
  grep -E '^[A-Za-z]' $requirements | while read -r package; do
    $venv/bin/python -m pip install --quiet --only-binary=:all: "$package" "$torch" ||
      say "$package cannot be installed: what needs it is skipped"
  done
}

has_avx512() { grep -qw avx512f /proc/cpuinfo 2>/dev/null; }

# build_ggml NAME CMAKE_ARGUMENTS...: .venv-bench/ggml/NAME/libggml_linear.so
build_ggml() {
  local name=$1
  shift
  say "building ggml ($name)"
  if ! {
    cmake -S benchmarks/ggml -B "$work/build-$name" -G Ninja -DCMAKE_BUILD_TYPE=Release \
      -DGGML_SOURCE="$work/llama.cpp/ggml" "$@" &&
      cmake --build "$work/build-$name" --target ggml_linear
  } >"$work/$name.log" 2>&1; then
    tail -n 20 "$work/$name.log" >&2
    return 1
  fi
  mkdir -p "$venv/ggml/$name"
  cp "$work/build-$name/libggml_linear.so" "$venv/ggml/$name/"
}

install_ggml() {
  local stamp=$venv/.ggml.sha256
  if [ -f $venv/ggml/native/libggml_linear.so ] && sha256sum --check --status "$stamp" 2>/dev/null; then
    return
  fi
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  say "fetching llama.cpp's source: llama-cpp-python==$llama_cpp_python"
  $venv/bin/python -m pip download --quiet --no-deps --no-binary=:all: --dest "$work" \
    "llama-cpp-python==$llama_cpp_python" || return 1
  mkdir "$work/llama.cpp"
  tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work/llama.cpp" --strip-components=3 \
    --wildcards '*/vendor/llama.cpp/ggml' || return 1
  build_ggml native -DGGML_NATIVE=ON || return 1
  rm -rf $venv/ggml/avx2
  if has_avx512; then
    build_ggml avx2 -DGGML_NATIVE=OFF -DGGML_SSE42=ON -DGGML_AVX=ON -DGGML_AVX2=ON \
      -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON || return 1
  else
    ln -s native $venv/ggml/avx2
  fi
  sha256sum benchmarks/ggml/* scripts/bench-setup.sh >"$stamp"
}

install_python_packages
install_ggml || say "no ggml: the benchmark skips it"
say "all is in place"
