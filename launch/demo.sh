#!/usr/bin/env bash
# Handwritten digits from nothing: shards, a training on two processes, its figures, and where to look.
#   launch/demo.sh .venv/bin [section.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${1:?usage: launch/demo.sh FOLDER_OF_PROGRAMS [section.key=value ...]}
shift

[ -f store/digits/index.json ] || "$bin/aaae" prepare digits --out store/digits
"$bin/accelerate" launch --config_file launch/ddp.yaml -m aaae_dist train configs/digits.toml "$@"
echo
"$bin/aaae" evaluate runs/digits
run=$(cat runs/digits/mlflow_run_id)
cat <<END

samples and reconstructions   $(find runs/digits/samples -name '*.png' | sort | tail -n 1)
metrics                       runs/digits/metrics.jsonl
MLflow                        make mlflow, then open http://127.0.0.1:5000/#/experiments/1/runs/$run
more samples                  $bin/aaae sample runs/digits --count 100 --out samples.png
END
