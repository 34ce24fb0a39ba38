#!/usr/bin/env bash
# Installs what building and testing need: Debian packages (scripts/debian-packages.txt, as root)
# and Python packages in .venv (requirements.txt). What is there already is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }
fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

is_installed() {
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

install_debian_packages() {
  local package missing=()
  if ! command -v dpkg-query >/dev/null; then
    say "no dpkg here: what scripts/debian-packages.txt lists must come from elsewhere"
    return
  fi
  while read -r package; do
    case $package in '' | '#'*) continue ;; esac
    is_installed "$package" || missing+=("$package")
  done <scripts/debian-packages.txt
  [ ${#missing[@]} -gt 0 ] || return 0

  if [ "$(id -u)" -ne 0 ]; then
    fail "Debian packages are missing. As root, run:
  apt-get install --no-install-recommends ${missing[*]}"
  fi
  say "installing Debian packages: ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

# The first python3 that can make a virtual environment with pip in it.
find_python() {
  local python
  for python in python3 /usr/bin/python3; do
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
  fail "no python3 with venv. As root, run:
  apt-get install --no-install-recommends python3-venv"
}

install_python_packages() {
  local python stamp=.venv/.requirements.sha256
  if sha256sum --check --status "$stamp" 2>/dev/null; then
    return
  fi
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "making .venv with $python"
    "$python" -m venv .venv
  fi
  # torch goes first and alone: one exact version, which the other packages then keep.
  say "installing Python packages into .venv: $(grep '^torch==' requirements.txt)"
  .venv/bin/python -m pip install --quiet "$(grep '^torch==' requirements.txt)"
  say "installing Python packages into .venv: the rest of requirements.txt"
  .venv/bin/python -m pip install --quiet --only-binary=:all: --requirement requirements.txt
  sha256sum requirements.txt >"$stamp"
}

install_debian_packages
install_python_packages
say "all is in place"
