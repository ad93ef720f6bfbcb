#!/usr/bin/env bash
# Trains on GPUs of a Slurm cluster: bash launch/slurm.sh [OPTIONS] [-- FLAGS of vivi_jax.main]
#
#   --nodes=1  --gpus=8 (per node)  --cpus=12 (per GPU)  --time=24:00:00  --partition=NAME  --account=NAME  --dry_run
#
# Makes the environment in .venv, which must be on a file system that all nodes see, and queues slurm_job.sh: a process
# per GPU, found by jax.distributed. Before the time is over, or when preempted, the run saves and queues itself again.
source "$(dirname "$0")/common.sh"
nodes=1 gpus=8 cpus=12 time=24:00:00 partition="" account=""
options "nodes gpus cpus time partition account" "$@"
[ ${#training[@]} -gt 0 ] || fail "no flags for python -m vivi_jax.main: write them behind --, at least --config=FILE"
how=("--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" "--cpus-per-task=$cpus"
  "--time=$time")
[ -z "$partition" ] || how+=("--partition=$partition")
[ -z "$account" ] || how+=("--account=$account")
run bash launch/environment.sh "[cuda]"
run mkdir -p runs
run sbatch "${how[@]}" launch/slurm_job.sh "${training[@]}"
