#!/usr/bin/env bash
# Make .venv from requirements.lock; at once when the lock and the project file are unchanged.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
stamp=.venv/.stamp
wanted=$(cat requirements.lock pyproject.toml | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted $PWD" ]; then
  exit 0
fi

"$python" - <<'PY' || { echo "remedy: install Python 3.11 or newer, or name one: PYTHON=python3.12 make setup" >&2; exit 2; }
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Reelflow needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}")
PY

if ! "$python" -c 'import ensurepip' 2>/dev/null; then
  package=$("$python" -c 'import sys; print(f"python3.{sys.version_info.minor}-venv")')
  echo "installing $package (Debian keeps the venv module apart)"
  run=()
  [ "$(id -u)" = 0 ] || run=(sudo -n)
  "${run[@]}" apt-get update -qq && "${run[@]}" apt-get install -y -qq "$package" || {
    echo "remedy: apt-get install $package, then the same command again" >&2
    exit 2
  }
fi

echo "setting up .venv (once; a few minutes)"
rm -f "$stamp"
[ -x .venv/bin/python ] && [ "$(.venv/bin/python -c 'import sys; print(sys.prefix)')" = "$PWD/.venv" ] ||
  { rm -rf .venv; "$python" -m venv .venv; }
# Byte code is compiled by two processes afterwards, faster than by pip one file at a time.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock 2> >(grep -v '^WARNING: Location' >&2)
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -e . 2> >(grep -v '^WARNING: Location' >&2)
.venv/bin/python -m compileall -q -j 0 .venv/lib/python3*/site-packages >/dev/null 2>&1 || true
echo "$wanted $PWD" >"$stamp"
