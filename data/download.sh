#!/usr/bin/env bash
# Fetch public datasets and the original prey into the folders where the scripts look for them.
# `bash data/download.sh --help` tells how. Needs bash 3.2 or later, and curl or wget.
set -euo pipefail
export LC_ALL=C # patterns see bytes

# Sources: hosts, and paths in the hosts' own trees, which a mirror has to keep
hub=${OM2P_DATA_URL:-https://huggingface.co}
github=${OM2P_DATA_URL:-https://raw.githubusercontent.com}
# OM2P's authors' upload; the files in it as its README names them. That is untried: the tree could
# not be reached from where this was written, so its sizes and checksums are unknown too.
datasets=/datasets/zhuoran-li/offline_marl_dataset
og_marl=/datasets/InstaDeepAI/og-marl
# At one commit, where the files stay even if og-marl moves them
preys=/instadeepai/og-marl/5b158ba90ffa0e6813018deb077273e9181b2e0d/og_marl/custom_environments
preys+=/multiagent_particle_envs/multiagent/adversaries
# To get them by hand, with a browser: OMAR's folders and, of tag and world, CFCQL's
drive=https://drive.google.com/drive/folders
tasks="simple_spread simple_tag simple_world HalfCheetah-2x3"

select_task() { # name: set what is known of it
    task=$1 public=$1 agents=3 archive=mpe/$1.zip prey_sha256=""
    case $1 in
        simple_spread) drive_id=1YVk_ajtvbcq8R2m0u0RasfB0csToV7XP ;;
        simple_tag)
            drive_id=1BQEXoMHYOpKOlDKeuYoZKxZ8SmlZBssq
            prey_sha256=b22b95f3397f41a21aa247810e385a8ecf85294f2e2ed8e523a954c633daf7a2
            ;;
        simple_world)
            drive_id=1amwez0Wft5flKn-TI0D4akEVi7am6OPE
            prey_sha256=ed3170cfb9c3f6872305c9c795a7aed089fde7b5e5cc2bff5f7debfed37c2115
            ;;
        HalfCheetah-2x3)
            drive_id=1zELoWUZoy3wPpwYni9t_TbzOjF4Px2f0
            public=HalfCheetah-v2 agents=2 archive=mamujoco/2halfcheetah.zip
            ;;
        *) misuse "there are no public data of '$1', only of ${tasks// /, }" ;;
    esac
}

usage() {
    cat <<'END'
usage: bash data/download.sh TASK QUALITY [SEED]  a dataset, and the task's prey if it has one
       bash data/download.sh TASK [prey]          the original prey of simple_tag or simple_world
       bash data/download.sh og-marl TASK         OG-MARL's archive of all qualities, which is for
                                                  data/convert_og_marl.py
       bash data/download.sh all                  all datasets and preys, not OG-MARL's archives
       bash data/download.sh --list               what there is

TASK     simple_spread, simple_tag, simple_world, HalfCheetah-2x3
QUALITY  expert, medium, medium-replay, random; the scripts' mixtures need both of their parts
SEED     0 to 4, default 0

--data-dir DIR  where to put them, default: the folder of this script

A dataset goes to DIR/TASK/QUALITY/seed_SEED_data/, a prey to DIR/TASK/pretrained_adv_model.pt, an
archive, unpacked, to DIR/og-marl/TASK/. What is there is left as it is. A download that was stopped
goes on when the command is repeated, or begins anew if the file has changed. Checksums are noted in
SHA256SUMS in DIR/TASK and DIR/og-marl, and later downloads have to agree with them.

Environment: OM2P_DATA_URL      address of a mirror, in place of https://huggingface.co and
                                https://raw.githubusercontent.com
             OM2P_RETRY_DELAYS  seconds before each new attempt, default "1 2 4 8 16"
             OM2P_TIMEOUT       seconds until a silent connection is given up, default 60

Exit status: 0 all is there, 1 something could not be fetched, 2 the command is wrong.
END
}

list() {
    cat <<'END'
task             expert, medium, random  medium-replay  prey    og-marl
simple_spread    1,000,000               97,500         none    4.98 GB
simple_tag       1,000,000               62,500         0.9 MB  6.32 GB
simple_world     1,000,000               80,000         1.0 MB  9.31 GB
HalfCheetah-2x3  1,000,000               460,000        none    2.35 GB

The first two columns count the transitions of each seed, 0 to 4 (medium-replay's of the one that is
known). The datasets' sizes in bytes are not known.
END
}

die() { echo "error: $*" >&2; exit 1; }
misuse() { echo "error: $*; --help shows the usage" >&2; exit 2; }

sha256() { # file
    { sha256sum <"$1" || shasum -a 256 <"$1"; } 2>/dev/null | cut -c 1-64
}

whole_array() { # file: is it as long as its .npy header says? An error page has no such header
    local header width type="'descr': '[<>|=]?[a-z]([0-9]+)'"
    local shape="'shape': \(([0-9]+)L?,( ([0-9]+)L?)?\)"
    header=$(head -c 4096 "$1" | tr -d '\0' | head -n 1)
    [[ $header == $'\x93NUMPY'* && $header =~ $type ]] || return 1
    width=${BASH_REMATCH[1]}
    [[ $header =~ $shape ]] || return 1
    width=$((width * ${BASH_REMATCH[3]:-1}))
    (($(wc -c <"$1") == $(head -c 4096 "$1" | head -n 1 | wc -c) + width * BASH_REMATCH[1]))
}

safe_archive() { # file: is all in it as it was packed, and does no name lead out of the folder?
    python3 - "$1" <<'END'
import sys, zipfile
archive = zipfile.ZipFile(sys.argv[1])
for name in archive.namelist():
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        sys.exit(f"the name {name!r} in it leads out of the folder")
if not archive.namelist():
    sys.exit("the archive is empty")
if name := archive.testzip():
    sys.exit(f"{name!r} in it is damaged")
END
}

mixed() { # headers of all requests for a part: are its bytes of more than one version of the file?
    awk '/^ *HTTP\// { sent = $2 ~ /^20/ } { sub("\r$", ""); key = tolower($1); $1 = "" }
        sent && key ~ /^(etag|last-modified):$/ && !seen[key, $0]++ { versions[key]++ }
        END { exit (versions["etag:"] ? versions["etag:"] : versions["last-modified:"]) < 2 }' \
        "$1"
}

request() { # URL, file: one transfer, from where the file ends; prints headers and complaints
    if [[ $tool == curl ]]; then
        set -- --fail --location --connect-timeout "$timeout" --speed-limit 1 \
            --speed-time "$timeout" --continue-at - --dump-header - --output "$2" "$1"
        if [[ -t 2 ]]; then curl --progress-bar "$@"; else curl --silent --show-error "$@" 2>&1; fi
    else
        set -- --tries=1 --timeout="$timeout" --continue --server-response \
            --append-output=/dev/stdout --output-document="$2" "$1"
        if [[ -t 2 ]]; then wget --no-verbose --show-progress "$@"; else wget --no-verbose "$@"; fi
    fi
}

download() { # URL, file: all of it, in several attempts; sets announced, the host's sha256 of it
    local delay size known report status code reason advice="repeat the command to go on, or "
    for delay in $delays none; do
        status=0 size=0
        [[ ! -s $2 ]] || size=$(($(wc -c <"$2")))
        { : >>"$2.headers"; } 2>/dev/null || die "$2.headers cannot be written"
        known=$(wc -c <"$2.headers")
        # In a file before the bytes are, they tell a later call the version even if this is killed
        request "$1" "$2" >>"$2.headers" || status=$?
        report=$(tail -c +$((known + 1)) "$2.headers" | tr -d '\r')
        code=$(sed -n 's/^ *HTTP\/[0-9.]* \([0-9]*\).*/\1/p' <<<"$report" | tail -n 1)
        # Hugging Face tells the sha256 of large files in this header
        announced=$(grep -i '^ *x-linked-etag: ' <<<"$report" | grep -oE '[0-9a-f]{64}') || true
        reason="$tool's exit status $status"
        [[ $report != *"curl: ("* ]] || reason="curl: (${report##*curl: (}"
        ((${code:-0} < 400)) || reason="HTTP $code"
        if mixed "$2.headers"; then
            rm -f "$2" && reason="the file has changed on the host" code="" status=0
        elif ((status == 0)) && [[ $code != 416 ]]; then
            return
        fi
        case $code,$tool,$status in
            408,* | 429,*) ;;
            416,*) # nothing comes after the part: it is the whole file, or of another one
                [[ $size == 0 || $report$'\n' != *"bytes */$size"$'\n'* ]] || return 0
                rm -f "$2"
                ;;
            200,curl,33) rm -f "$2" ;; # the host sends whole files only
            206,curl,33 | 206,wget,4) # other bytes than those after the part, or cut again
                [[ $report == *" bytes $size-"* ]] || rm -f "$2"
                ;;
            4*,* | *,curl,23 | *,wget,3) advice="" delay=none ;; # there is no such file, or no room
        esac
        [[ -s $2 ]] || rm -f "$2.headers" # where there is no part, any version may come next
        [[ $delay != none ]] || break
        echo "$reason; trying again in $delay s" >&2
        sleep "$delay"
    done
    die "$1 could not be fetched ($reason); ${advice}by hand: $by_hand"
}

refuse() { rm -f "$part" "$part.headers" && die "$url: $*; removed again; by hand: $by_hand"; }

fetch() { # URL, file, sha256 if known: download and check; only then has it its name
    local url=$1 part=$2.part sums=$root/SHA256SUMS name announced="" noted sum expected
    name=${2#"$root"/} name=${name/.tmp/}
    [[ ! -e $2 ]] || return 0
    echo "fetching $root/$name"
    download "$url" "$part"
    case $2 in
        *.npy) whole_array "$part" || refuse "what came is not a whole .npy file" ;;
        *.zip) sum=$(safe_archive "$part" 2>&1) || refuse "${sum##*$'\n'}" ;;
    esac
    sum=$(sha256 "$part")
    noted=$(awk -v name="$name" '$2 == name { print $1 }' "$sums" 2>/dev/null) || true
    for expected in ${3-} $announced; do
        [[ $sum == "$expected" ]] || refuse "what came has sha256 $sum, not $expected"
    done
    if [[ -n $noted ]]; then
        [[ $sum == "$noted" ]] || refuse "what came has sha256 $sum, not $noted" \
            "as noted in $sums; delete that line if it is wrong"
    else # on a line of its own, even if the one before was not written to its end
        [[ -z $(tail -c 1 "$sums" 2>/dev/null) ]] || sum=$'\n'$sum
        { echo "$sum  $name" >>"$sums"; } 2>/dev/null || die "$sums cannot be written"
    fi
    rm -f "$part.headers"
    mv "$part" "$2"
}

publish() { # temporary, final folder
    [[ ! -e $2 ]] || die "$2 has appeared meanwhile; $1 was left" # mv would move into it
    mv "$1" "$2"
}

make() { # folder
    local report
    report=$(mkdir -p "$1" 2>&1) || die "$1 cannot be made: ${report##*: }"
}

enter() { # folder: make it, and have one download at a time in it
    make "$1"
    command -v flock >/dev/null || return 0
    # curl holds this lock too. Should the script be killed alone, the next one then waits for that
    # curl to end, and two never write to one part. File systems without locks do without.
    exec 9<"$1"
    flock --nonblock 9 || { echo "waiting for another download to $1" && flock 9; } || true
}

data=$(dirname "${BASH_SOURCE[0]}") words=()
while (($#)); do
    case $1 in
        -h | --help) usage && exit ;;
        --list) list && exit ;;
        --data-dir=?*) data=${1#*=} ;;
        --data-dir) [[ -n ${2-} ]] || misuse "--data-dir needs a folder"; data=$2; shift ;;
        -*) misuse "there is no option $1" ;;
        *) words+=("$1") ;;
    esac
    shift
done
set -- ${words[@]+"${words[@]}"}

delays=${OM2P_RETRY_DELAYS-1 2 4 8 16} timeout=${OM2P_TIMEOUT:-60} failed=0
[[ $timeout != *[!0-9]* ]] || misuse "OM2P_TIMEOUT is whole seconds, not '$timeout'"
for delay in $delays; do
    [[ $delay =~ ^[0-9]*[.]?[0-9]+$ ]] || misuse "OM2P_RETRY_DELAYS is seconds, not '$delays'"
done
if command -v curl >/dev/null; then tool=curl; else tool=wget; fi
command -v "$tool" >/dev/null || die "there is neither curl nor wget"
again=("$BASH" "${BASH_SOURCE[0]}" --data-dir "$data") # one failure does not stop the others

case "${1-},${2-prey}" in
    ,*) misuse "TASK is missing" ;;
    all,*)
        (($# == 1)) || misuse "'$2' is one word too many"
        for task in $tasks; do
            for quality in expert medium medium-replay random; do
                for seed in 0 1 2 3 4; do "${again[@]}" "$task" "$quality" "$seed" || failed=1; done
            done
        done
        ;;
    og-marl,*)
        (($# == 2)) || misuse "og-marl takes one TASK"
        select_task "$2"
        command -v python3 >/dev/null || die "there is no python3, which unpacks the archive"
        root=$data/og-marl folder=$data/og-marl/$task
        by_hand="https://huggingface.co$og_marl, unpacked to $folder/"
        enter "$root"
        if [[ ! -e $folder ]]; then
            make "$folder.tmp"
            fetch "${hub%/}$og_marl/resolve/main/prior_work/omar/$archive" "$folder.tmp/archive.zip"
            echo "unpacking"
            rm -rf "$folder.tmp/unpacked" # of a call that was stopped
            report=$(python3 -m zipfile -e "$folder.tmp/archive.zip" "$folder.tmp/unpacked" 2>&1) ||
                die "$folder.tmp/archive.zip cannot be unpacked: ${report##*$'\n'};" \
                    "make room, or remove it to have it fetched anew"
            publish "$folder.tmp/unpacked" "$folder"
        fi
        rm -rf "$folder.tmp"
        echo "$folder is there; data/convert_og_marl.py makes datasets of it"
        ;;
    *,prey)
        select_task "$1"
        [[ -n $prey_sha256 ]] || misuse "$task has no prey; QUALITY is missing"
        (($# < 3)) || misuse "'$3' is one word too many"
        root=$data/$task path=$data/$task/pretrained_adv_model.pt
        by_hand="$drive/$drive_id, to $path"
        enter "$root"
        fetch "${github%/}$preys/$task/pretrained_adv_model.pt" "$path" "$prey_sha256"
        [[ $(sha256 "$path") == "$prey_sha256" ]] || die "$path is another prey; move it away first"
        echo "$path is there"
        ;;
    *,expert | *,medium | *,medium-replay | *,random)
        select_task "$1"
        (($# < 4)) || misuse "'$4' is one word too many"
        [[ ${3-0} == [0-4] ]] || misuse "there is no seed '$3', only 0 to 4"
        [[ -z $prey_sha256 ]] || "${again[@]}" "$task" prey || failed=1
        root=$data/$task folder=$data/$task/$2/seed_${3-0}_data files="" made=""
        by_hand="https://huggingface.co$datasets or $drive/$drive_id, to $folder/"
        for ((i = 0; i < agents; i++)); do
            for name in obs acs rews next_obs dones; do files+=" ${name}_$i.npy"; done
        done
        enter "$root/$2"
        if [[ -e $folder ]]; then
            for name in $files; do
                [[ -e $folder/$name ]] || die "$folder is there without $name; move it away first"
            done
            [[ ! -e $folder/card.json ]] || made=", made here; move it away to fetch it"
        else
            make "$folder.tmp"
            url=${hub%/}$datasets/resolve/main/$public/$2/seed_${3-0}_data
            for name in $files; do fetch "$url/$name" "$folder.tmp/$name"; done
            publish "$folder.tmp" "$folder"
        fi
        echo "$folder is there$made"
        ;;
    *) misuse "there is no quality '$2'; it is expert, medium, medium-replay or random, or prey" ;;
esac
exit "$failed"
