#!/usr/bin/env bash
# Runs on every host of a TPU VM, called by tpu_vm.sh: bash on_tpu_vm.sh start BUCKET FLAGS... | status | stop | kill
#
# start: environment, bucket ('' for none) at /mnt/BUCKET, then training that outlives the ssh connection; its output is
# in ~/vivi_jax.log, its exit code in ~/vivi_jax.exit. status: "running", "exit CODE", or "none".
set -euo pipefail
cd "$(dirname "$0")/.."

running() {
  local pid
  pid="$(cat ~/vivi_jax.pid 2>/dev/null)" && grep -qa on_tpu_vm.sh "/proc/$pid/cmdline" 2>/dev/null
}

mount_bucket() {
  if ! command -v gcsfuse >/dev/null; then # as Google's installation page says
    local key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
    curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list
    sudo apt-get update -qq
    sudo apt-get install -qq -y gcsfuse
  fi
  sudo mkdir -p "/mnt/$1"
  sudo chown "$(id -u):$(id -g)" "/mnt/$1"
  mountpoint -q "/mnt/$1" || gcsfuse --implicit-dirs "$1" "/mnt/$1"
}

start() {
  local bucket="$1"
  shift
  local seconds="${PATIENCE:-120}"
  while running && [ "$seconds" -gt 0 ]; do # one that was told to leave may still be saving
    sleep 1
    seconds=$((seconds - 1))
  done
  if running; then
    echo "already running"
    return
  fi
  [ -z "$bucket" ] || mount_bucket "$bucket"
  PYTHON="$(bash launch/python.sh)" bash launch/environment.sh "[tpu]"
  rm -f ~/vivi_jax.exit
  setsid nohup bash launch/on_tpu_vm.sh train "$@" >>~/vivi_jax.log 2>&1 </dev/null &
  echo $! >~/vivi_jax.pid
  echo "started"
}

train() {
  local code=0 child told_to_leave=""
  trap 'told_to_leave=1; kill -TERM "$child"' TERM
  .venv/bin/python -m vivi_jax.main "$@" &
  child=$!
  wait "$child" || code=$?
  if [ -n "$told_to_leave" ]; then # the signal ended the wait, not the run
    code=0
    wait "$child" || code=$?
  fi
  echo "$code" >~/vivi_jax.exit
}

case "$1" in
  start | train)
    command="$1"
    shift
    "$command" "$@"
    ;;
  status)
    if running; then
      echo "running"
    elif [ -f ~/vivi_jax.exit ]; then
      echo "exit $(cat ~/vivi_jax.exit)"
    else
      echo "none"
    fi
    ;;
  stop) ! running || kill -TERM "$(cat ~/vivi_jax.pid)" ;;
  kill) ! running || kill -KILL -- "-$(cat ~/vivi_jax.pid)" ;; # the whole group
esac
