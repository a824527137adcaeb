# shellcheck shell=bash
# Sourced: `say` prints progress to stdout, `die` prints one error to stderr and ends the script.

say() { printf '%s\n' "$*"; }

# die MESSAGE [STATUS]
die() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-1}"
}
