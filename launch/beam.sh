#!/usr/bin/env bash
# Prepares or curates videos on a cluster: bash launch/beam.sh dataflow|flink|spark prepare|curate [OPTIONS] [-- FLAGS]
#
#   --image=IMAGE      of launch/image.sh beam, for the workers     --workers=100    at most
#   dataflow: --project=ID --region=REGION --bucket=NAME (for Beam's own files) --machine=n2-standard-8 --spot
#   flink:    --master=HOST:8081                                    spark: --master=HOST:8099, Beam's job server
#   --dry_run          prints the command
# FLAGS are those of python -m input_pipeline.prepare_beam or input_pipeline.curate, such as --videos and --out. Started
# again, the same command goes on where it was.
source "$(dirname "$0")/common.sh"
[ $# -ge 2 ] || fail "usage: bash launch/beam.sh dataflow|flink|spark prepare|curate [OPTIONS] [-- FLAGS]"
runner="$1" task="$2"
shift 2
image="" workers=100 project="" region="" bucket="" machine=n2-standard-8 spot="" master=""
options "image workers project region bucket machine spot master" "$@"
needs image
[ ${#training[@]} -gt 0 ] || fail "no flags for the command: write them behind --, such as --videos and --out"
case "$task" in
  prepare) module=input_pipeline.prepare_beam ;;
  curate) module=input_pipeline.curate ;;
  *) fail "unknown task $task: prepare or curate" ;;
esac
case "$runner" in
  dataflow)
    needs project region bucket
    how=(--runner=DataflowRunner "--project=$project" "--region=$region" "--temp_location=gs://$bucket/beam"
      "--sdk_container_image=$image" "--max_num_workers=$workers" "--worker_machine_type=$machine" --disk_size_gb=200)
    [ -z "$spot" ] || how+=(--flexrs_goal=COST_OPTIMIZED)
    ;;
  flink)
    needs master
    how=(--runner=FlinkRunner "--flink_master=$master" --environment_type=DOCKER "--environment_config=$image"
      "--parallelism=$workers")
    ;;
  spark)
    needs master
    how=(--runner=PortableRunner "--job_endpoint=$master" --environment_type=DOCKER "--environment_config=$image")
    ;;
  *) fail "unknown runner $runner: dataflow, flink or spark" ;;
esac
run bash launch/environment.sh "[dataflow]"
run .venv/bin/python -m "$module" "${training[@]}" "${how[@]}"
