# shellcheck shell=bash
# Sourced: two ways to speak. Progress goes to stdout; an error goes to stderr, once, and ends the script.

say() { printf '%s\n' "$*"; }

# die MESSAGE [STATUS]
die() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-1}"
}
