# shellcheck shell=bash
# Sourced after caller.sh and log.sh: `read_site FILE` appends a site file's settings to the array SITE_ENV as
# KEY=VALUE.
# A site file is never sourced, and nothing in it is expanded. It holds one KEY=VALUE per line, with the value as it is.
# Empty lines and lines that begin with # are skipped. Anything else is refused with its line number. The line itself is
# not shown, because it may hold a secret.

# Variables that the launcher and torchrun set, and those that choose the launcher's own programs.
SITE_OWNED=" PATH PYTHONPATH RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK NODE_RANK MASTER_ADDR MASTER_PORT VENV \
LONGSEQ_START_FOLDER "

# shellcheck disable=SC2034  # SITE_ENV is the result
read_site() {
  local file=$1 line number=0 key value seen=" "
  [[ -r $file && ! -d $file ]] || die "site file $file cannot be read; examples are scripts/sites/*.env" 2
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    ((number > 1)) || line=${line#$'\xef\xbb\xbf'} # a byte order mark
    line=${line%$'\r'}
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    [[ $line =~ ^([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] ||
      die "$file:$number: not KEY=VALUE (no export, no spaces around =)" 2
    key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    [[ $SITE_OWNED != *" $key "* ]] || die "$file:$number: $key is set by the launcher; remove it" 2
    [[ $key != SLURM_* ]] || die "$file:$number: $key is set by slurm; remove it" 2
    [[ $seen != *" $key "* ]] || die "$file:$number: $key is set a second time" 2
    [[ $value != [\"\'[:space:]]* && $value != *' #'* && $value != *[[:space:]] && $value != *'$'* ]] ||
      die "$file:$number: $key: the value is used as it is: no quotes, no \$, no comment, no space before or after it" 2
    seen+="$key "
    SITE_ENV+=("$key=$value")
  done <"$file"
}

# setting KEY: prints a variable as the ranks get it, the caller's or else the site file's, and fails if neither sets it.
setting() {
  local pair
  if [[ -n ${CALLER[$1]+set} ]]; then
    printf '%s' "${CALLER[$1]}"
    return
  fi
  for pair in "${SITE_ENV[@]}"; do
    if [[ $pair == "$1="* ]]; then
      printf '%s' "${pair#*=}"
      return
    fi
  done
  return 1
}
