#!/usr/bin/env bash
# Makes requirements.lock anew from setup.py (newest versions in its ranges). Needs uv: pip install uv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# The platform changes no pin (the same versions exist for x86_64 and aarch64, 3.12 and 3.13): one plain list is enough.
{
  printf '# Every package of the two commands, pinned with hashes. Made by: bash scripts/lock.sh\n'
  uv pip compile setup.py --extra run --extra data --extra test --extra dev --upgrade --quiet --generate-hashes \
    --python-version 3.12 --python-platform x86_64-manylinux_2_28 --no-header --no-emit-index-url
} >requirements.lock.new
mv requirements.lock.new requirements.lock
