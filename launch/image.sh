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
run docker build --file=launch/Dockerfile "--target=$target" "--tag=$image" .
run docker push "$image"
