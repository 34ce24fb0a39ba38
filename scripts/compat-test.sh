#!/usr/bin/env bash
# Runs tests/python/compat under transformers 4 and 5, in .venv-tf4 and .venv-tf5: environments that
# add tests/python/compat/requirements-*.txt to the packages of .venv. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'compat-test: %s\n' "$*"; }

make_environment() {
  local venv=.venv-$1 requirements=tests/python/compat/requirements-$1.txt
  local stamp=$venv/.requirements.sha256 site='sysconfig.get_path("purelib")'
  if sha256sum --check --status "$stamp" 2>/dev/null; then
    return
  fi
  say "making $venv"
  .venv/bin/python -m venv --clear --without-pip "$venv"
  # What the environment lacks, pip too, comes from .venv.
  .venv/bin/python -c "import sysconfig; print($site)" \
    >"$($venv/bin/python -c "import sysconfig; print($site)")/base.pth"
  "$venv/bin/python" -m pip install --quiet --no-deps --only-binary=:all: \
    --disable-pip-version-check --requirement "$requirements" 2>&1 | sed '/ignored: it is neither/d'
  sha256sum "$requirements" >"$stamp"
}

status=0
for environment in tf4 tf5; do
  make_environment $environment
  say "$environment"
  HF_HUB_OFFLINE=1 PYTHONPATH=$PWD/python \
    QUANTAL_LIBRARY=${QUANTAL_LIBRARY:-$PWD/build/release/src/libquantal.so} \
    .venv-$environment/bin/python -m pytest tests/python/compat "$@" || status=1
done
exit $status
