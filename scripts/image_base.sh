#!/usr/bin/env bash
# Builds a base for the CPU image from Debian's packages, where no registry of images can be reached:
#   bash scripts/image_base.sh longseq-base:trixie
#   docker build --target test --build-arg TEST_BASE=longseq-base:trixie -t longseq:test .
# It needs root, debootstrap, and podman or docker (ENGINE=). Debian 13 has Python 3.13. The certificates of this machine
# are copied, because a mirror or proxy of packages may need them.
[ -n "${BASH_VERSION:-}" ] || { echo "error: run this with bash: bash $0 ..." >&2 && exit 2; }
set -euo pipefail
# shellcheck source=scripts/lib/log.sh
source "$(dirname "$(realpath -- "${BASH_SOURCE[0]}")")/lib/log.sh"

tag=${1:-}
suite=${SUITE:-trixie}
[[ $# == 1 && $tag == *:* ]] || die "usage: bash scripts/image_base.sh NAME:TAG" 2
[[ $(id -u) == 0 ]] || die "debootstrap needs root"
type -P debootstrap >/dev/null || die "debootstrap is missing: apt-get install debootstrap"
engine=${ENGINE:-$(type -P podman || type -P docker || true)}
[[ -n $engine ]] || die "neither podman nor docker is on PATH"

root=$(mktemp -d)
trap 'rm -rf -- "$root"' EXIT
packages=ca-certificates,git,python3,python3-venv
settings=(--change "ENV PATH=/opt/python/bin:/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin" --change "CMD bash")
say "installing Debian $suite into $root"
debootstrap --variant=minbase --include="$packages" "$suite" "$root" "${MIRROR:-http://deb.debian.org/debian}" >&2
# pip cannot replace packages of Debian's Python, so it gets an environment of its own.
chroot "$root" python3 -m venv /opt/python
if [[ -f /etc/ssl/certs/ca-certificates.crt ]]; then
  cp -- /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
  settings+=(--change "ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt")
fi
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
tar -C "$root" -c . | "$engine" import "${settings[@]}" - "$tag" >/dev/null
say "built $tag with $("$root/usr/bin/python3" --version 2>/dev/null || printf 'Python of Debian %s' "$suite")"
