#!/usr/bin/env bash
# From nothing to a pretrained encoder in a few minutes: bash launch/demo.sh [--seed=0] [--out=runs/demo]
source "$(dirname "$0")/environment.sh" ""
exec .venv/bin/python launch/demo.py "$@"
