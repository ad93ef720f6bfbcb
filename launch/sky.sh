#!/usr/bin/env bash
# Trains with SkyPilot as a managed job: bash launch/sky.sh NAME [OPTIONS] [-- FLAGS of vivi_jax.main]
#
#   --accelerators=H100:8  --nodes=1  --infra=CLOUD[/REGION]  --spot  --bucket=gs://NAME or s3://NAME  --dry_run
#
# A job that was preempted goes on elsewhere, so data and run directory must be in a bucket: as gs:// paths (data also
# s3://), or below /data, where --bucket is mounted on every node.
source "$(dirname "$0")/common.sh"
[ $# -ge 1 ] || fail "usage: bash launch/sky.sh NAME [OPTIONS] [-- FLAGS]"
name="$1"
shift
accelerators=H100:8 nodes=1 infra="" spot="" bucket=""
options "accelerators nodes infra spot bucket" "$@"
[ ${#training[@]} -gt 0 ] || fail "no flags for python -m vivi_jax.main: write them behind --, at least --config=FILE"
how=(-n "$name" --gpus "$accelerators" --num-nodes "$nodes" --env "FLAGS=$(words "${training[@]}")" --yes)
[ -z "$infra" ] || how+=(--infra "$infra")
[ -z "$spot" ] || how+=(--use-spot)
task="launch/sky.yaml"
if [ -n "$bucket" ]; then
  task="$(mktemp -d)/sky.yaml"
  printf '%s\nfile_mounts:\n  /data:\n    source: "%s"\n    mode: MOUNT\n' "$(cat launch/sky.yaml)" "$bucket" >"$task"
  [ -z "$dry_run" ] || cat "$task"
fi
run sky jobs launch "${how[@]}" "$task"
