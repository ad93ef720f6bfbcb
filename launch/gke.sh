#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster, as a JobSet: bash launch/gke.sh up|log|delete NAME [OPTIONS] [-- FLAGS]
#
#   --image=IMAGE          of launch/image.sh tpu
#   --accelerator=tpu-v5-lite-podslice  --topology=4x4  --chips=4 (per host)   as the node pool has them
#   --account=NAME         a service account that may use the bucket: data and run directory may be gs:// paths as they are
#   --bucket=NAME          mounted at /mnt/NAME, for what needs files
#   --spot                 on spot nodes         --restarts=10   after crashes; preemptions do not count
#   --dry_run              prints what would be applied
# kubectl must point at a cluster with the JobSet operator. A preempted run saves, leaves with code 143, and the JobSet
# starts all its pods again.
source "$(dirname "$0")/common.sh"
[ $# -ge 2 ] || fail "usage: bash launch/gke.sh up|log|delete NAME [OPTIONS] [-- FLAGS]"
command="$1" name="$2"
shift 2
image="" accelerator=tpu-v5-lite-podslice topology=4x4 chips=4 bucket="" account=default spot="" restarts=10
options "image accelerator topology chips bucket account spot restarts" "$@"
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "the name $name must be of a-z, 0-9 and -, at most 40"

json() {
  local text="${1//\\/\\\\}"
  [[ "$text" != *$'\n'* ]] || fail "a flag holds a line break"
  printf '"%s"' "${text//\"/\\\"}"
}

json_list() {
  local text="" item
  for item in "$@"; do
    text+="${text:+, }$(json "$item")"
  done
  printf '[%s]' "$text"
}

manifest() {
  local text hosts=1 side
  for side in ${topology//x/ }; do
    hosts=$((hosts * side))
  done
  [ $((hosts % chips)) -eq 0 ] || fail "$topology has $hosts chips, which hosts of $chips do not divide"
  hosts=$((hosts / chips))
  text="$(cat launch/gke_jobset.yaml)"
  [ -n "$spot" ] || text="$(grep -v '# spot$' <<<"$text")"
  [ -n "$bucket" ] || text="$(grep -v '# bucket$' <<<"$text")"
  text="${text//@NAME@/"$(json "$name")"}"
  text="${text//@IMAGE@/"$(json "$image")"}"
  text="${text//@ACCELERATOR@/"$(json "$accelerator")"}"
  text="${text//@TOPOLOGY@/"$(json "$topology")"}"
  text="${text//@ACCOUNT@/"$(json "$account")"}"
  text="${text//@BUCKET@/"$(json "$bucket")"}"
  text="${text//@MOUNT@/"$(json "/mnt/$bucket")"}"
  text="${text//@FLAGS@/"$(json_list "${training[@]}")"}"
  text="${text//@HOSTS@/$hosts}"
  text="${text//@CHIPS@/$chips}"
  text="${text//@RESTARTS@/$restarts}"
  echo "$text"
}

case "$command" in
  up)
    needs image
    [ ${#training[@]} -gt 0 ] || fail "no flags for python -m vivi_jax.main: write them behind --"
    rendered="$(manifest)"
    if [ -n "$dry_run" ]; then
      echo "+ kubectl apply -f -"
      echo "$rendered"
    else
      kubectl apply -f - <<<"$rendered"
    fi
    ;;
  log)
    first="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
    run kubectl logs --follow "--selector=$first"
    ;;
  delete) run kubectl delete jobset "$name" ;;
  *) fail "unknown command $command: up, log or delete" ;;
esac
