#!/usr/bin/env bash
# Builds and pushes a container image: bash launch/image.sh cpu|cuda|tpu|beam REGISTRY/NAME:TAG [--dry_run]
source "$(dirname "$0")/common.sh"
[ $# -ge 2 ] || fail "usage: bash launch/image.sh cpu|cuda|tpu|beam REGISTRY/NAME:TAG [--dry_run]"
target="$1" image="$2"
shift 2
options "" "$@"
case "$target" in
  cpu | cuda | tpu | beam) ;;
  *) fail "unknown kind of image $target: cpu, cuda, tpu or beam" ;;
esac
# The same Python as environment.sh takes here: Beam sends the workers code that another version does not read.
version="$("$(bash launch/python.sh)" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
run docker build --file=launch/Dockerfile "--target=$target" "--build-arg=PYTHON=$version" "--tag=$image" .
run docker push "$image"
