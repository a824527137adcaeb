#!/usr/bin/env bash
# One GPU, one command: kernels, training, memory and speed within minutes; one JSON object last. See README.md here.
#   bash tests/gpu/run.sh [--wheels DIR] [--minutes 12] [--out DIR] [--only SECTION...] [--device cpu] [--dry-run]
# --wheels: folder of wheels (default: build/wheels, where it exists); PYTHON=... names the Python that has PyTorch.
set -euo pipefail
unset CDPATH # with it, cd prints where
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)

die() { printf 'error: %s\n' "$1" >&2; exit 2; }

wheels=$ROOT/build/wheels device=cuda dry=no further=()
while (($#)); do
  case $1 in
    --wheels) wheels=${2:?--wheels needs a folder}; [[ -d $wheels ]] || die "--wheels $wheels: no such folder"; shift 2 ;;
    --device) device=${2:?--device needs cuda or cpu}; further+=("$1" "$2"); shift 2 ;;
    *) [[ $1 != --dry-run ]] || dry=yes; further+=("$1"); shift ;;
  esac
done

# The plan needs no torch; a run does, and one that sees the device unless it is told to do without.
check='import sys; sys.version_info >= (3, 12) or sys.exit(1)'
[[ $dry == yes ]] || check+='; import torch'
[[ $dry == yes || $device == cpu ]] || check+='; torch.cuda.is_available() or sys.exit(1)'
candidates=(python3.12 python3.13 python3 python /opt/conda/bin/python "$ROOT/.venv/bin/python")
candidates+=("${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python)
[[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
python=
for one in "${candidates[@]}"; do
  if path=$(type -P "$one") && "$path" -c "$check" >/dev/null 2>&1; then python=$path; break; fi
done
[[ $dry == yes ]] && wanted="Python from 3.12 on" || wanted="Python from 3.12 on with PyTorch for $device"
[[ -n $python ]] || die "no $wanted was found (looked at: ${candidates[*]}): PYTHON=/path/to/python names one"

# Beside the system's Python, never into it: what it lacks, from the folder alone.
if [[ $dry == no && -d $wheels ]]; then
  packages=$(mktemp -d "${TMPDIR:-/tmp}/longseq-packages.XXXXXX")
  trap 'rm -rf "$packages"' EXIT
  "$python" "$ROOT/tests/gpu/unpack.py" "$wheels" "$packages" || die "the wheels of $wheels cannot be used here"
  PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
if [[ $dry == no ]]; then
  "$python" -c 'import megatron.core, psutil' 2>/dev/null ||
    die "megatron-core or psutil is missing: give --wheels DIR (tests/gpu/README.md says how to fill it)"
fi
cd "$ROOT"
# Not exec: the packages are removed afterwards. A signal is handed on, so that the result is still printed.
"$python" -m tests.gpu.run "${further[@]}" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM INT HUP
status=0
wait "$child" || status=$?
# A signal ends the first wait before the child has ended.
while ((status > 128)) && kill -0 "$child" 2>/dev/null; do status=0; wait "$child" || status=$?; done
exit "$status"
