# shellcheck shell=bash
# Shared by the scripts beside it; sourced, not run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
jobs=${GDN_JOBS:-$(nproc)}

say() { printf 'gdn: %s\n' "$*" >&2; }
die() { say "$*"; exit 3; }

# quietly COMMAND...: shows what the command printed only if it fails.
quietly() {
  local log status=0
  log=$(mktemp)
  "$@" >"$log" 2>&1 </dev/null || status=$?
  if ((status != 0)); then
    tail -n 200 "$log" >&2
    say "failed with status $status: $*"
  fi
  rm -f "$log"
  return "$status"
}

# build PRESET [arguments of cmake --build]: shows warnings, and everything if it fails.
build() {
  local log status=0
  log=$(mktemp)
  cmake --build "$root/build/$1" --parallel "$jobs" "${@:2}" >"$log" 2>&1 </dev/null || status=$?
  if ((status != 0)); then
    tail -n 200 "$log" >&2
    say "the build of $1 failed"
  else
    grep -A 6 'warning:' "$log" >&2 || true
  fi
  rm -f "$log"
  return "$status"
}

# configure PRESET KOKKOS_PREFIX [-D...]: configures build/PRESET if it was not yet, or for another Kokkos or other options.
configure() {
  local preset=$1 prefix=$2 dir=$root/build/$1 wanted
  shift 2
  wanted=$(printf '%s\n' "$prefix" "$@")
  if [[ ! -f $dir/build.ninja || ! -f $dir/.configured || $(<"$dir/.configured") != "$wanted" ]]; then
    quietly cmake -S "$root" --fresh --preset "$preset" -DKokkos_ROOT="$prefix" "$@" || return
    printf '%s\n' "$wanted" >"$dir/.configured"
  fi
}
