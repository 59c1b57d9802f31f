#!/usr/bin/env bash
# A robot without public data, from nothing: behaviour, dataset, OM2P. Writes benchmark/results/own_task.txt.
# Half an hour on one core; the behaviour alone a quarter of one. TASK=Ant-2x4 chooses another one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
task=${TASK:-Hopper-3x1}

run() { # print a command, then its output without progress bars
    echo "\$ $*"
    "$@" 2>/dev/null
}

{
    run python data/collect_mamujoco.py --task "$task" --train --train-steps 200000
    for quality in medium-replay expert; do
        run python data/collect_mamujoco.py --task "$task" --quality "$quality" --seed 0
        run python om2p_mamujoco.py --task "$task" --quality "$quality" --seed 0
    done
} | sed -u "s|$PWD/||" | tee benchmark/results/own_task.txt
