#!/usr/bin/env bash
# One configuration over a list of checkpoints, each into a folder of its own, then `qkov compare` of all in that order.
# Usage: [OUTPUT=runs/training] bash launch/checkpoints.sh CONFIG.yaml CHECKPOINT [CHECKPOINT ...] [section.key=value ...]
#        bash launch/checkpoints.sh first.yaml out/checkpoint-100 out/checkpoint-200 tasks.0.max_samples=32
# A checkpoint is what model.path takes. Results go to OUTPUT/NAME (by default runs/checkpoints), NAME the last part of a
# checkpoint's path; the comparison to OUTPUT. The same command goes on after an interruption: a finished checkpoint is
# read back, an interrupted one resumes. A launcher in front starts each run on several ranks:
#        LAUNCHER="bash launch/accelerate.sh fsdp2" bash launch/checkpoints.sh first.yaml out/checkpoint-*
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
config="${1:?expected a configuration and its checkpoints, got nothing}"
shift
checkpoints=() overrides=() folders=()
for word in "$@"; do
    if [[ "$word" =~ ^[a-z_]+(\.[a-z0-9_]+)+= ]]; then overrides+=("$word"); else checkpoints+=("$word"); fi
done
if [ "${#checkpoints[@]}" -eq 0 ]; then
    echo "launch/checkpoints.sh: expected one checkpoint or more, got none. Name them after the configuration." >&2
    exit 2
fi
output="${OUTPUT:-runs/checkpoints}"
for checkpoint in "${checkpoints[@]}"; do
    folder="$output/$(basename "$checkpoint")"
    for known in "${folders[@]}"; do
        if [ "$known" = "$folder" ]; then
            echo "launch/checkpoints.sh: expected checkpoints of different names, got $(basename "$checkpoint") twice." \
                "Run them into different folders (OUTPUT), then qkov compare." >&2
            exit 2
        fi
    done
    folders+=("$folder")
done
ensure_environment report
read -r -a launcher <<<"${LAUNCHER:-$PYTHON -m qkov_dist run}"
for place in "${!checkpoints[@]}"; do
    echo "launch/checkpoints.sh: $((place + 1)) of ${#checkpoints[@]}, ${checkpoints[place]}" >&2
    "${launcher[@]}" "$config" "model.path=${checkpoints[place]}" "output.dir=${folders[place]}" "${overrides[@]}"
done
if [ "${#checkpoints[@]}" -gt 1 ]; then
    exec "$PYTHON" -m qkov_dist compare "${folders[@]}" --output "$output"
fi
