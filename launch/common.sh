# shellcheck shell=bash disable=SC2034
# Sourced by the launchers: --NAME=VALUE options into variables, and commands that are run, or with --dry_run printed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry_run=""
training=() # what stands behind --

fail() {
  echo "error: $*" >&2
  exit 2
}

# options "NAMES" ARGUMENT...: sets the variable of each --NAME=VALUE whose name is among NAMES, and of --NAME to 1.
options() {
  local known=" $1 dry_run " name
  shift
  while [ $# -gt 0 ]; do
    case "$1" in
      --) shift && training=("$@") && return ;;
      --*)
        name="${1#--}"
        name="${name%%=*}"
        if [[ "$known" != *" $name "* ]]; then
          known="${known% }"
          fail "unknown option --$name; there are${known// / --}"
        fi
        case "$1" in
          *=*) printf -v "$name" %s "${1#*=}" ;;
          *) printf -v "$name" %s 1 ;;
        esac
        ;;
      *) fail "unexpected argument $1; options are --NAME=VALUE, and the command's own flags stand behind --" ;;
    esac
    shift
  done
}

# needs NAME...: options that must have been given.
needs() {
  local name
  for name in "$@"; do
    [ -n "${!name}" ] || fail "--$name=VALUE is missing"
  done
}

# words ARGUMENT...: one line that a shell reads as these arguments.
words() {
  [ $# -eq 0 ] || printf '%q ' "$@"
}

run() {
  if [ -n "$dry_run" ]; then
    echo "+ $(words "$@")"
  else
    "$@"
  fi
}
