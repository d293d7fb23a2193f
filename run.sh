#!/usr/bin/env bash
# From a bare machine to scores: install and data (stage 0), training (1), evaluation (2).
set -euo pipefail

usage() {
    cat <<'EOF'
./run.sh [options] [flags of train.py] [--eval flags of eval.py]
    train and evaluate; without --root and --conf, a demo of minutes
./run.sh test [flags of pytest]
    run the tests

  --stage N       start at stage N: 0 install and data, 1 train, 2 evaluate  [0]
  --root ROOT ... the data set, wav, flac or .stem.mp4, in one folder or several; trains the whole
                  model with conf.yml's defaults
  --tag NAME      name of the run: everything goes to exp/NAME  [demo, or musdb18 with --root]
  --conf FILE     the conf.yml of a run, to train the same again; needs --tag
  --id GPUS       GPUs to use, such as 0 or 0,1  [all there are]
  --check         look at everything as train.py does, and end
  --version       of the recipe
EOF
}

here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
if [ ! -e "$here/train.py" ]; then
    here=${SLURM_SUBMIT_DIR:-}  # sbatch runs a copy of this script in a folder of its own
    if [ ! -e "$here/train.py" ]; then
        echo "run.sh: error: no train.py beside it; with sbatch, submit it from its folder" >&2
        exit 2
    fi
fi
python=$here/.venv/bin/python

say() { printf '\n== %s (after %d:%02d)\n' "$*" $((SECONDS / 60)) $((SECONDS % 60)); }
fail() { printf 'run.sh: error: %s\n' "$*" >&2; exit 2; }

# A model and a schedule that learn the demo songs in minutes on two cores.
demo_model=(--N 128 --L 80 --B 64 --H 128 --X 6 --R 1)
demo_flags=(
    --segment 1 --samples_per_track 16 --aggregate 1 --epochs 20 --lr 0.003
    --num_workers 1 --devices 1
)

install_system_packages() {
    local packages=() candidate system_python=
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            system_python=$candidate
            break
        fi
    done
    [ -n "$system_python" ] || fail "Python 3.10 or newer is needed, and there is none on the PATH"
    "$system_python" -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
    command -v ffmpeg >/dev/null && command -v ffprobe >/dev/null || packages+=(ffmpeg)
    # asteroid pulls in pesq, which is compiled on installation.
    command -v cc >/dev/null || packages+=(gcc libc6-dev)
    local headers='import os, sysconfig as s; print(os.path.join(s.get_path("include"), "Python.h"))'
    [ -e "$("$system_python" -c "$headers")" ] || packages+=(python3-dev)
    if [ ${#packages[@]} -gt 0 ]; then
        if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
            fail "missing on this machine; install with: sudo apt-get install ${packages[*]}"
        fi
        say "stage 0: installing ${packages[*]}"
        apt-get update -q
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${packages[@]}"
    fi
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        say "stage 0: making .venv"
        rm -rf "$here/.venv"
        "$system_python" -m venv "$here/.venv"
    fi
}

install() {
    install_system_packages
    local installed=$here/.venv/requirements.txt
    if ! cmp -s "$here/requirements.txt" "$installed"; then
        say "stage 0: installing requirements.txt"
        "$python" -m pip install -r "$here/requirements.txt"
        cp "$here/requirements.txt" "$installed"
    fi
}

module() { (cd "$here" && "$python" -m "$@"); }

if [ "${1:-}" = test ]; then
    shift
    install
    cd "$here"
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    if [ $# = 0 ]; then
        set -- --numprocesses logical --maxprocesses 4 --dist worksteal
    fi
    exec "$python" -m pytest "$@"
fi

# ~ and ~user, which the shell leaves as they are in --root=~/MUSDB18.
expand_home() {
    local home=${1%%/*}
    local below=${1#"$home"}
    if [[ $home =~ ^~[[:alnum:]._-]*$ ]]; then eval "home=$home"; fi
    printf '%s' "$home$below"
}

stage=0 roots=() packed=() tag='' gpus='' conf='' check='' train_flags=() eval_flags=()
while [ $# -gt 0 ]; do
    if [[ $1 =~ ^--(stage|root|tag|id|conf)= ]]; then
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
    fi
    case $1 in
        -h | --help) usage; exit ;;
        --version) sed -n 's/^__version__ = "\(.*\)"/run.sh \1/p' "$here/local/__init__.py"; exit ;;
        --stage | --root | --tag | --id | --conf)
            [ -n "${2:-}" ] || fail "$1 needs a value"
            case $1 in
                --stage) stage=$2 ;;
                --root) roots=("$(realpath -m "$(expand_home "$2")")") ;;
                --tag) tag=$2 ;;
                --id) gpus=$2 ;;
                --conf) conf=$(realpath -m "$(expand_home "$2")") ;;
            esac
            flag=$1
            shift 2
            while [ "$flag" = --root ] && [[ $# -gt 0 && $1 != -* ]]; do
                roots+=("$(realpath -m "$(expand_home "$1")")")
                shift
            done
            ;;
        --exp[_-]dir | --exp[_-]dir=*) fail "runs go to exp/NAME here: use --tag NAME" ;;
        --eval) shift; eval_flags=("$@"); break ;;
        --check) check=1; train_flags+=("$1"); shift ;;
        *) train_flags+=("$1"); shift ;;
    esac
done
[[ $stage =~ ^[012]$ ]] || fail "--stage must be 0, 1 or 2, got $stage"
[[ $tag != */* && $tag != .* ]] || fail "--tag must be a plain name, got $tag"
[ -z "$conf" ] || [ -e "$conf" ] || fail "--conf: no such file: $conf"
[ -z "$conf" ] || [ -n "$tag" ] || fail "--conf needs --tag NAME, the name of the new run"
for flag in "${eval_flags[@]}"; do
    [[ ! $flag =~ ^--(exp|out)[_-]dir ]] || fail "results go to exp/NAME/eval here: omit $flag"
done

test_set=() page=() given_flags=("${train_flags[@]}")
if [ ${#roots[@]} -gt 0 ]; then
    exp=$here/exp/${tag:-musdb18}
    for number in "${!roots[@]}"; do
        root=${roots[number]}
        [ -d "$root" ] || fail "--root: no such folder: $root"
        if compgen -G "$root/[tv]*/*.[sS][tT][eE][mM].[mM][pP]4" >/dev/null; then
            packed+=("$root")
            roots[number]=$root-wav
        fi
    done
    test_set=(--root "${roots[@]}")
    train_flags=("${test_set[@]}" "${train_flags[@]}")
elif [ -z "$conf" ]; then
    exp=$here/exp/${tag:-demo} page=(--page)
    if [[ " ${train_flags[*]}" =~ \ --init[\ =] ]]; then demo_model=(); fi # that of --init
    train_flags=(--root "$here/data/demo" "${demo_model[@]}" "${demo_flags[@]}" "${train_flags[@]}")
fi
if [ -n "$conf" ]; then
    exp=$here/exp/$tag
    train_flags=(--conf "$conf" "${train_flags[@]}")
fi
train_flags=(--exp_dir "$exp" "${train_flags[@]}")
eval_flags=(--exp_dir "$exp" --out_dir eval "${test_set[@]}" "${page[@]}" "${eval_flags[@]}")

# With --version at the end, the commands read their flags and do no more.
check_flags() {
    local fault hint=
    if ! fault=$("$python" "$here/train.py" "${train_flags[@]}" --version 2>&1); then
        [[ $fault != *"no flag"* ]] || hint="; flags of eval.py go after --eval"
        fail "${fault#*: error: }$hint"
    fi
    fault=$("$python" "$here/eval.py" "${eval_flags[@]}" --version 2>&1) ||
        fail "--eval: ${fault#*: error: }"
}

if [ "$stage" -le 0 ]; then install; fi
[ -x "$python" ] || fail "there is no .venv yet; start with --stage 0"
check_flags
if [ "$stage" -le 0 ]; then
    for root in "${packed[@]}"; do
        say "stage 0: decoding $root to $root-wav"
        module local.stems "$root" "$root-wav"
    done
fi
if [ "$stage" -le 0 ] && [ ${#roots[@]} = 0 ] && [ -z "$conf" ]; then
    say "stage 0: the demo data set"
    module local.demo_musdb18 data/demo
fi

use_gpu=0
if [ -n "$gpus" ]; then
    export CUDA_VISIBLE_DEVICES=$gpus
    train_flags=(--accelerator gpu "${train_flags[@]}")
    use_gpu=1
elif "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    use_gpu=1
fi

trap : USR1 # which srun sends to train.py and eval.py as well: they end by it
if [ "$stage" -le 1 ] || [ -n "$check" ]; then
    say "stage 1: training"
    status=0
    "$python" "$here/train.py" "${train_flags[@]}" || status=$?
    if [ "$status" = 2 ] && [ -e "$exp/conf.yml" ]; then
        echo "run.sh: --tag NAME trains in another folder; --stage 2 evaluates what is there" >&2
    fi
    if [ "$status" != 0 ] || [ -n "$check" ]; then exit "$status"; fi
elif [ ${#given_flags[@]} -gt 0 ]; then
    echo "run.sh: --stage 2 does not train, and does not need ${given_flags[*]}" >&2
fi

say "stage 2: evaluation"
[ -e "$exp/best_model.pth" ] || fail "$exp holds no trained model; start with --stage 0 or 1"
"$python" "$here/eval.py" --use_gpu "$use_gpu" "${eval_flags[@]}"
cat <<EOF

separated audio    $exp/eval/TRACK/{vocals,accompaniment}.wav
best model         $exp/best_model.pth
results            $exp/eval/results.txt, results.csv; per track in eval/test/
EOF
if [ -e "$exp/eval/page/index.html" ]; then
    echo "to see and hear    $exp/eval/page/index.html, in a browser"
fi
