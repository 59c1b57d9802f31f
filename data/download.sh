#!/usr/bin/env bash
# Fetch public datasets and OMAR's prey into the folders where the scripts look for them.
set -euo pipefail

# OM2P's authors' upload, with the files as its README names them. That is untried: no public host
# could be reached from where this was written.
datasets=zhuoran-li/offline_marl_dataset
og_marl=InstaDeepAI/og-marl
preys=https://raw.githubusercontent.com/instadeepai/og-marl/5b158ba90ffa0e6813018deb077273e9181b2e0d
preys=${OM2P_PREY_URL:-$preys/og_marl/custom_environments/multiagent_particle_envs/multiagent/adversaries}

usage() {
    cat <<'END'
usage: bash data/download.sh TASK QUALITY [SEED]  a dataset, and the task's prey if it has one
       bash data/download.sh TASK [prey]          OMAR's prey of simple_tag or simple_world
       bash data/download.sh og-marl TASK         OG-MARL's archive, for data/convert_og_marl.py
       bash data/download.sh --list               what there is

TASK            simple_spread, simple_tag, simple_world, HalfCheetah-2x3
QUALITY         expert, medium, medium-replay, random
SEED            0 to 4, default 0
--data-dir DIR  where to put them, default: the folder of this script

A dataset goes to DIR/TASK/QUALITY/seed_SEED_data/ unless that is there, a prey to DIR/TASK/prey.npz
in place of another one, an archive, unpacked, to DIR/og-marl/TASK/. A download that was stopped
goes on when the command is repeated. Needs Hugging Face's client (pip install huggingface_hub),
which HF_ENDPOINT points to a mirror; for a prey curl.
END
}

list() {
    cat <<'END'
task             expert, medium, random  medium-replay  prey    og-marl  by hand
simple_spread    1,000,000               97,500         none    4.98 GB  1YVk_ajtvbcq8R2m0u0RasfB0csToV7XP
simple_tag       1,000,000               62,500         0.9 MB  6.32 GB  1BQEXoMHYOpKOlDKeuYoZKxZ8SmlZBssq
simple_world     1,000,000               80,000         1.0 MB  9.31 GB  1amwez0Wft5flKn-TI0D4akEVi7am6OPE
HalfCheetah-2x3  1,000,000               460,000        none    2.35 GB  1zELoWUZoy3wPpwYni9t_TbzOjF4Px2f0

The first columns count the transitions of each seed, 0 to 4. By hand: OMAR's and CFCQL's folders at
drive.google.com/drive/folders/, or huggingface.co/datasets/zhuoran-li/offline_marl_dataset.
END
}

die() { echo "error: $*" >&2; exit 1; }

hub() { # repository, pattern, folder: resumes, tries again, checks
    command -v hf >/dev/null || die "Hugging Face's client is missing: pip install huggingface_hub"
    hf download "$1" --repo-type dataset --include "$2" --local-dir "$3" >/dev/null ||
        die "$2 of $1 could not be fetched; repeat the command to go on, --list tells other places"
}

get_prey() { # task, sha256
    local path=$data/$1/pretrained_adv_model.pt sum
    if [[ ! -e $path ]]; then
        mkdir -p "$data/$1"
        curl --fail --location --silent --show-error --retry 3 --connect-timeout 10 \
            --output "$path.tmp" "$preys/$1/pretrained_adv_model.pt" ||
            die "the prey of $1 could not be fetched; --list tells other places"
        mv "$path.tmp" "$path"
    fi
    sum=$({ sha256sum <"$path" || shasum -a 256 <"$path"; } 2>/dev/null | cut -c 1-64)
    [[ $sum == "$2" ]] || die "$path is not OMAR's, its sha256 is $sum; remove it"
    python "$here/convert_prey.py" "$path" "$data/$1/prey.npz"
    echo "$data/$1/prey.npz is OMAR's"
}

get_dataset() { # task, quality, seed, name of the task there, agents
    local part=$data/$1/.$2-$3 folder=$data/$1/$2/seed_$3_data there=$4/$2/seed_$3_data i file
    if [[ ! -e $folder ]]; then
        hub "$datasets" "$there/*" "$part"
        for ((i = 0; i < $5; i++)); do
            for file in {obs,acs,rews,next_obs,dones}_$i.npy; do
                [[ -s $part/$there/$file ]] || die "$datasets has no $there/$file; see --list"
            done
        done
        mkdir -p "$data/$1/$2"
        mv "$part/$there" "$folder"
        rm -rf "$part"
    fi
    echo "$folder is there; data/card.py tells what it holds"
}

get_archive() { # task, path there
    local part=$data/og-marl/.$1 folder=$data/og-marl/$1
    if [[ ! -e $folder ]]; then
        hub "$og_marl" "prior_work/omar/$2" "$part"
        python -m zipfile -e "$part/prior_work/omar/$2" "$part/unpacked" || die "$part is no archive"
        mv "$part/unpacked" "$folder"
        rm -rf "$part"
    fi
    echo "$folder is there; data/convert_og_marl.py makes datasets of it"
}

here=$(dirname "${BASH_SOURCE[0]}") data=$(dirname "${BASH_SOURCE[0]}") words=()
while (($#)); do
    case $1 in
        -h | --help) usage && exit ;;
        --list) list && exit ;;
        --data-dir) data=${2:?is missing} && shift ;;
        *) words+=("$1") ;;
    esac
    shift
done
set -- ${words[@]+"${words[@]}"}
task=${1-} what=${2-prey} seed=${3-0} tasks='(simple_spread|simple_tag|simple_world|HalfCheetah-2x3)'
[[ $task/$what/$seed =~ ^$tasks/(expert|medium|medium-replay|random|prey)/[0-4]$ ||
    $task/$what =~ ^og-marl/$tasks$ ]] ||
    die "'$*' is not to be had; --help and --list tell what is"
case $task/$what in
    */prey) ;;
    og-marl/H*) get_archive "$what" mamujoco/2halfcheetah.zip ;;
    og-marl/*) get_archive "$what" "mpe/$what.zip" ;;
    simple_*) get_dataset "$task" "$what" "$seed" "$task" 3 ;;
    *) get_dataset "$task" "$what" "$seed" HalfCheetah-v2 2 ;;
esac
case $task/$what in
    simple_tag/*) get_prey simple_tag b22b95f3397f41a21aa247810e385a8ecf85294f2e2ed8e523a954c633daf7a2 ;;
    simple_world/*) get_prey simple_world ed3170cfb9c3f6872305c9c795a7aed089fde7b5e5cc2bff5f7debfed37c2115 ;;
    */prey) die "$task has no prey" ;;
esac
