#!/usr/bin/env bash
# Prints the path of a Python 3.11 or newer; machines in the cloud may have none, and get one from uv.
set -euo pipefail
for candidate in "${PYTHON:-}" python3 python3.12 python3.11 python3.13; do
  if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    command -v "$candidate"
    exit
  fi
done
python3 -m pip install --quiet --user uv >&2
python3 -m uv python install --quiet 3.12 >&2
python3 -m uv python find 3.12
