#!/usr/bin/env bash
#SBATCH --job-name=vivi_jax
#SBATCH --output=runs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
# The job that slurm.sh queues. Slurm sends this shell SIGTERM five minutes before the time is over, and when it
# preempts the job. The shell hands it on to the processes; they save, leave with 143, and the job is queued again. So
# it is, at most RESTARTS times, after a hang (75) and after the death of a process (134, of the others).
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
told_to_leave=""
trap 'told_to_leave=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM # to the steps, not to this shell

RESTARTS=10
srun --kill-on-bad-exit=0 --wait=300 .venv/bin/python -m vivi_jax.main "$@" &
code=0
wait $! || code=$?
if [ -n "$told_to_leave" ]; then # the signal ended the wait, not the run
  code=0
  wait $! || code=$?
fi
case "$code" in
  143) scontrol requeue "$SLURM_JOB_ID" ;;
  75 | 134)
    hangs="runs/slurm-$SLURM_JOB_ID.hangs" # SLURM_RESTART_COUNT counts preemptions too
    mkdir -p runs
    echo "$code" >>"$hangs"
    [ "$(wc -l <"$hangs")" -gt "$RESTARTS" ] || scontrol requeue "$SLURM_JOB_ID"
    ;;
esac
exit "$code"
