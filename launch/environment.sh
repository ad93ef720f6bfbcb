# shellcheck shell=bash
# Sourced by demo.sh and test.sh: makes .venv once, and again when the pinned versions or the wanted extras change.
# Usage: source launch/environment.sh EXTRAS   e.g. "" or "[development]"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}"

python=""
for candidate in "${PYTHON:-}" python3 python3.12 python3.11 python3.13; do
  if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python="$candidate"
    break
  fi
done
if [ -z "$python" ]; then
  echo "error: Python 3.11 or newer is needed, and none was found; install one, or set PYTHON=/path/to/python3" >&2
  exit 1
fi

if [ ! -x .venv/bin/python ]; then
  echo "Creating a virtual environment in .venv with $("$python" --version) ..."
  "$python" -m venv .venv
fi
stamp="$extras $(cat setup.py constraints.txt | cksum)"
if ! grep -qxF -- "$stamp" .venv/installed 2>/dev/null; then
  echo "Installing vivi_jax$extras and what it needs (about two minutes, once) ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extras"
  echo "$stamp" >> .venv/installed
fi
