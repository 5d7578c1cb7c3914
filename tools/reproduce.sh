#!/usr/bin/env bash
# One command a table: trains each of its configs in turn, then prints the table.
#
#   tools/reproduce.sh coco|voc|lowdata [options of tools/train.py, such as --cfg-options data_root=DIR]
#
# What is done is skipped and what died goes on: call it again until it ends well. A config that fails does not stop the others.
# GPUS=8 trains on eight of them, with as many images on each: docs/reproduce.md says what that changes; ONLY='*rkan-r50_*' takes the configs of that pattern; WORK_DIRS=DIR is where runs are kept.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
    coco) configs=(configs/rkan/mask-rcnn_*_fpn_authors-1x_coco.py) ;;
    voc) configs=(configs/rkan/faster-rcnn_*_voc0712.py) ;;
    lowdata) configs=(configs/lowdata/*.py) ;;
    *)
        echo 'usage: tools/reproduce.sh coco|voc|lowdata [options of tools/train.py]' >&2
        exit 2
        ;;
esac
shift
python=${PYTHON:-python}
runs=${WORK_DIRS:-work_dirs}
gpus=${GPUS:-1}
if ! [[ $gpus =~ ^[1-9][0-9]*$ ]]; then
    echo "error: GPUS must be a number of GPUs, but got $gpus" >&2
    exit 2
fi
options=$*
if [ "$gpus" -gt 1 ]; then
    options="GPUS=$gpus $*"
fi
trap 'exit 130' INT # torchrun ends as if it had failed, after which the next config would begin
trap 'exit 143' TERM
mkdir -p "$runs"
chosen=() failed=()
for config in "${configs[@]}"; do
    # shellcheck disable=SC2053 # ONLY is a pattern
    [[ $(basename "$config") == ${ONLY:-*} ]] && chosen+=("$config")
done
if [ ${#chosen[@]} -eq 0 ]; then
    echo "error: ONLY=${ONLY:-} matches none of: ${configs[*]}" >&2
    exit 2
fi

for config in "${chosen[@]}"; do
    run=$runs/$(basename "$config" .py)
    if [ -e "$run/done" ]; then
        if [ "$(<"$run/done")" != "$options" ]; then
            echo "error: $run is done, but with other options ($(<"$run/done")): set WORK_DIRS to another folder" >&2
            exit 2
        fi
        echo "$run is done"
        continue
    fi
    echo "$run: training (started $(date '+%F %T'))"
    train=("$python" tools/train.py "$config")
    if [ "$gpus" -gt 1 ]; then
        train=(tools/dist_train.sh "$config" "$gpus")
    fi
    if PYTHON=$python "${train[@]}" --work-dir "$run" --resume --auto-scale-lr "$@"; then
        echo "$options" >"$run/done"
    else
        failed+=("$config")
    fi
done

"$python" tools/make_table.py "${chosen[@]}" --work-dirs "$runs"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed, and will go on when this is called again: %s\n' "${failed[@]}" >&2
    exit 1
fi
