#!/usr/bin/env bash
# Trains on a Cloud TPU VM or a slice of many: bash launch/tpu_vm.sh COMMAND NAME --zone=ZONE [OPTIONS] [-- FLAGS]
#
#   up       create, push, run, watch: from a clone to the first step, and through preemptions to the end
#   create   the TPU VM; --queued waits in line for it          push    the tracked files of this clone, to all hosts
#   run      python -m vivi_jax.main FLAGS, on all hosts        watch   until the end; recreates what was preempted
#   log      follow the first host's output                     stop    SIGTERM to all hosts: save and leave
#   delete   the TPU VM (and its queued request)
#
#   --type=v5litepod-16  --version=v2-alpha-tpuv5-lite  --project=ID  --spot  --reserved  --queued  --poll=SECONDS
#   --bucket=NAME   mounted at /mnt/NAME on every host, for what needs files
#   --dry_run       prints the commands instead
# Data and run directory may be gs:// paths as they are; for more than one host they must be there, or in that mount.
# gcloud must be installed and logged in; what it says and its exit code are passed on.
source "$(dirname "$0")/common.sh"
[ $# -ge 2 ] || fail "usage: bash launch/tpu_vm.sh COMMAND NAME --zone=ZONE [OPTIONS] [-- FLAGS];" \
  "COMMAND is up, create, push, run, watch, log, stop or delete"
command="$1" name="$2"
shift 2
zone="" type="v5litepod-8" version="v2-alpha-tpuv5-lite" project="" spot="" reserved="" queued="" bucket="" poll=60
options "zone type version project spot reserved queued bucket poll" "$@"
needs zone
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")

case "$command" in
  up | run | watch)
    [ ${#training[@]} -gt 0 ] || fail "no flags for python -m vivi_jax.main: write them behind --"
    ;;
esac

tpus() { run gcloud compute tpus "$@" "${where[@]}"; }
on_hosts() { tpus tpu-vm ssh "$name" "--worker=$1" "--command=$2"; }

create() {
  local how=("--accelerator-type=$type") code=0
  [ -z "$spot" ] || how+=(--spot)
  [ -z "$reserved" ] || how+=(--reserved)
  if [ -n "$queued" ]; then
    tpus queued-resources create "$name" "--node-id=$name" "--runtime-version=$version" "${how[@]}" || code=$?
  else
    tpus tpu-vm create "$name" "--version=$version" "${how[@]}" || code=$?
  fi
  if [ "$code" -ne 0 ]; then
    echo "error: $name was not created (gcloud's exit code $code; what it said is above)" >&2
    exit "$code"
  fi
  [ -z "$queued" ] || wait_in_line
}

wait_in_line() {
  [ -z "$dry_run" ] || { tpus queued-resources describe "$name" "--format=value(state.state)"; return; }
  local state
  while :; do
    state="$(tpus queued-resources describe "$name" "--format=value(state.state)")"
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPENDED)
        tpus queued-resources describe "$name" "--format=yaml(state)" >&2
        echo "error: the queued request $name is $state, as above; delete it, and ask for what there is" >&2
        exit 1
        ;;
    esac
    echo "$(date -u +%H:%M:%S) $name is $state"
    sleep "$poll"
  done
}

push() {
  local archive code=0
  archive="$(mktemp -d)/vivi_jax.tgz"
  git ls-files -z | tar --null --files-from=- -czf "$archive"
  { tpus tpu-vm scp "$archive" "$name:vivi_jax.tgz" --worker=all &&
    on_hosts all "mkdir -p vivi_jax && tar -xzf vivi_jax.tgz -C vivi_jax"; } || code=$?
  rm -r "$(dirname "$archive")"
  return "$code"
}

train() {
  on_hosts all "bash vivi_jax/launch/on_tpu_vm.sh start $(words "$bucket")$(words "${training[@]}")"
}

delete() {
  if [ -n "$queued" ]; then
    tpus queued-resources delete "$name" --force --quiet
  else
    tpus tpu-vm delete "$name" --quiet
  fi
}

# What there is now: "gone", or what the first host says ("running", "exit CODE", "none"), or "unknown".
state_now() {
  local state
  if ! state="$(tpus tpu-vm describe "$name" "--format=value(state)" 2>&1)"; then
    case "$state" in
      *NOT_FOUND* | *"not found"*) echo gone ;;
      *) echo unknown ;;
    esac
    return
  fi
  case "$state" in
    READY) on_hosts 0 "bash vivi_jax/launch/on_tpu_vm.sh status" || echo unknown ;;
    PREEMPTED | TERMINATED | STOPPED | SUSPENDED) echo gone ;;
    *) echo unknown ;;
  esac
}

give_up() {
  echo "error: the run ended with code ${1#exit }; its last lines:" >&2
  on_hosts 0 "tail -n 20 vivi_jax.log" >&2 || true
  exit "${1#exit }"
}

watch() {
  [ -z "$dry_run" ] || {
    tpus tpu-vm describe "$name" "--format=value(state)"
    echo "# every $poll s, until the run has ended; if preempted: delete, create, push, run, and it goes on"
    return
  }
  local state again="" restarts=10 # after crashes; preemptions do not count
  while :; do
    state="$(state_now | tail -n 1)"
    echo "$(date -u +%H:%M:%S) $name: $state"
    case "$again$state" in
      gone | again*)
        echo "$name was preempted; making it again"
        again="again" # until it runs: there may be no room yet, or it is taken away at once
        delete || true # of a spot TPU the remains are there as a rule
        if (create) && push && train; then
          again=""
        fi
        ;;
      "exit 0") return ;;
      "exit 143" | none) train || true ;; # told to leave, and has saved; or the host has started anew
      "exit 75" | "exit 134") # ended by the watchdog; or a process has died, and JAX has ended this one
        [ "$restarts" -gt 0 ] || give_up "$state"
        restarts=$((restarts - 1))
        on_hosts all "bash vivi_jax/launch/on_tpu_vm.sh kill" || true # what still hangs
        train || true
        ;;
      exit\ *) give_up "$state" ;;
    esac
    sleep "$poll"
  done
}

case "$command" in
  up)
    create
    push
    train
    watch
    ;;
  run) train ;;
  log) on_hosts 0 "tail -n 100 -F vivi_jax.log" ;;
  stop) on_hosts all "bash vivi_jax/launch/on_tpu_vm.sh stop" ;;
  create | push | watch | delete) "$command" ;;
  *) fail "unknown command $command: up, create, push, run, watch, log, stop or delete" ;;
esac
