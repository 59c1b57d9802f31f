#!/usr/bin/env bash
# A robot without public data, from nothing: behaviour, dataset, OM2P. Writes benchmark/results/own_task.txt.
# Half an hour on one core, most of it for the behaviour. TASK=Ant-4x2 chooses another one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
task=${TASK:-Walker2d-2x3}

errors=$(mktemp)
trap 'rm -f "$errors"' EXIT

run() { # print a command, then its output without progress bars; if it fails, why
    echo "\$ $*"
    "$@" 2>"$errors" || { tail -n 1 "$errors" >&2; exit 1; }
}

{
    run python data/train_behavior.py --task "$task" --train-steps 400000 --out "data/behavior/$task.npz"
    for quality in medium-replay expert; do
        run python data/collect_mamujoco.py --task "$task" --quality "$quality" --seed 0
        run python om2p_mamujoco.py --task "$task" --quality "$quality" --seed 0
    done
} | sed -u "s|$PWD/||" | tee benchmark/results/own_task.txt
