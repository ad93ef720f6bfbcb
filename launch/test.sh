#!/usr/bin/env bash
# Runs the tests in an environment of their own: bash launch/test.sh [pytest arguments]
# EXTRAS="[development,torch]" adds PyTorch, and with it the parity tests.
source "$(dirname "$0")/environment.sh" "${EXTRAS:-[development]}"
exec .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
