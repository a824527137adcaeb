#!/usr/bin/env bash
# Writes requirements.lock from the ranges in setup.py, with the newest versions. It needs uv: pip install uv.
[ -n "${BASH_VERSION:-}" ] || { echo "error: run this with bash: bash $0 ..." >&2 && exit 2; }
set -euo pipefail
unset CDPATH # with it, cd may go elsewhere
cd "$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")/.."
# One list is enough, because the same versions exist for x86_64 and aarch64 and for Python 3.12 and 3.13.
{
  printf '# Every package of the two commands, pinned with hashes. Made by: bash scripts/lock.sh\n'
  uv pip compile setup.py --extra run --extra data --extra sft --extra test --extra dev --upgrade --quiet --generate-hashes \
    --python-version 3.12 --python-platform x86_64-manylinux_2_28 --no-header --no-emit-index-url
} >requirements.lock.new
mv requirements.lock.new requirements.lock
