#!/usr/bin/env bash
# What a newcomer does, as README.md and docs/ say it, on a CPU: own videos -> store -> encoder -> features, fine-tuned
# classes, and exports that other libraries load. Writes docs/newcomer.md: each command with the first and last lines of
# its output and its seconds. In a fresh clone, with copies of some videos and of class folders with train/ and test/:
#   bash launch/newcomer.sh VIDEOS IMAGES
# --config.encoder.*, image_size and epochs make the run small; nothing else differs from the pages. timm needs a
# torchvision that fits its torch: PyPI's two do, a torch for CPUs from elsewhere does not (docs/exports.md).
set -euo pipefail
cd "$(dirname "$0")/.."
videos="${1:?VIDEOS, a folder}" images="${2:?IMAGES, a folder with train/ and test/}"
page=docs/newcomer.md log="$(mktemp)" here="$PWD"
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3
trap 'rm -f "$log"' EXIT
ln -sfn "$videos" VIDEOS
ln -sfn "$images" IMAGES

clean() { # no path of this machine, no colours, of a progress bar its last state
  sed -e 's/.*\r\(.\)/\1/' -e 's/\r//g' -e 's/\x1b\[[0-9;]*m//g' \
    -e "s#$here#.#g" -e "s#$(readlink -f "$videos")#VIDEOS#g" -e "s#$(readlink -f "$images")#IMAGES#g" \
    -e "s#$HOME#~#g" -e "s#[^ ]*/site-packages/#.../#g" | cut -c1-160 | grep -v '^ *$' || true
}

try() { # a command as a line of a shell
  local start=$SECONDS lines
  printf '\n```console\n$ %s\n' "$1" >> "$page"
  echo "== $1"
  if ! bash -c "$1" > "$log" 2>&1; then
    tail -20 "$log"
    exit 1
  fi
  clean < "$log" > "$log.clean"
  lines=$(wc -l < "$log.clean")
  if [ "$lines" -gt 12 ]; then
    { head -5 "$log.clean"; echo "[... $((lines - 11)) lines]"; tail -6 "$log.clean"; } >> "$page"
  else
    cat "$log.clean" >> "$page"
  fi
  rm "$log.clean"
  printf '```\n\n%d s\n' $((SECONDS - start)) >> "$page"
}

title() { printf '\n## %s\n' "$1" >> "$page"; }

cat > "$page" << 'PAGE'
# As a newcomer

The log of one who has a folder of videos, a fresh clone and a CPU, and follows README.md. `bash launch/newcomer.sh VIDEOS
IMAGES` made this page and makes it again; of each output it keeps the first and last lines, and the seconds are those of
a busy machine of two cores. The run is small: a ResNet-18, 64 pixels, few epochs. Nobody should expect good
features of it.
PAGE
printf '\n%s, Python %s, commit %s.\n' "$(date -u +%F)" "$(python3 -c 'import platform; print(platform.python_version())')" \
  "$(git rev-parse --short HEAD)" >> "$page"

title "Install"
[ ! -e .venv ] || printf '\nThe same commands had made the environment before, so that here they find everything there.\n' >> "$page"
try 'python3 -m venv .venv'
try '.venv/bin/python -m pip install -qq -c constraints.txt -e ".[huggingface,onnx]" && .venv/bin/python -m pip list | grep -E "^(jax|flax|torch|transformers|onnxruntime|tensorflow-cpu) "'

title "Own videos"
try '.venv/bin/python -m input_pipeline.prepare --videos=VIDEOS --out=STORE --contact_sheet'
try '.venv/bin/python -m vivi_jax.main --config=vito:own --config.data.path=STORE --workdir=RUN --config.encoder.depth=18 --config.data.image_size=64 --config.schedule.epochs=4'
try '.venv/bin/python -m evaluation.report --checkpoint=RUN'
try '.venv/bin/python -m evaluation.embed VIDEOS --checkpoint=RUN --out=features.npz --fps=1'
try ".venv/bin/python -c 'import numpy; print({name: (a.shape, a.dtype) for name, a in numpy.load(\"features.npz\").items()})'"

title "Own classes"
try '.venv/bin/python -m evaluation.probe --checkpoint=RUN --data=IMAGES --mode=knn'
try '.venv/bin/python -m evaluation.vtab --tasks=own --config=configs/vtab.py:demo --checkpoint=RUN --data=IMAGES --workdir=FINETUNED && cat FINETUNED/own.md'

title "Elsewhere"
try '.venv/bin/python -m vivi_jax.export --checkpoint=RUN --format=huggingface --out=huggingface --image_size=64'
try ".venv/bin/python -c 'import torch, transformers; model, report = transformers.AutoModel.from_pretrained(\"huggingface\", output_loading_info=True); print(report); print(model(torch.zeros(1, 3, 64, 64)).pooler_output.shape)'"
try '.venv/bin/python -m vivi_jax.export --checkpoint=RUN --format=onnx --out=encoder.onnx --image_size=64'
try ".venv/bin/python -c 'import numpy, onnxruntime; session = onnxruntime.InferenceSession(\"encoder.onnx\"); print(session.run([\"features\"], {\"images\": numpy.zeros((2, 64, 64, 3), \"float32\")})[0].shape)'"
try '.venv/bin/python -m pip install -qq -c constraints.txt -e ".[timm]" && .venv/bin/python -m pip list | grep -E "^(torch|torchvision|timm) "'
if .venv/bin/python -c "import timm" 2> "$log"; then
  try '.venv/bin/python -m vivi_jax.export --checkpoint=RUN --format=timm --out=timm_folder --image_size=64'
  try ".venv/bin/python -c 'import os, timm, torch; model = timm.create_model(\"local-dir:\" + os.path.abspath(\"timm_folder\"), pretrained=True); print(model(torch.zeros(1, 3, 64, 64)).shape)'"
else
  printf '\ntimm was left out here: %s ([exports.md](exports.md#what-differs)).\n' "$(tail -1 "$log")" >> "$page"
fi
echo "wrote $page"
