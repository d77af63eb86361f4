#!/usr/bin/env bash
# The first process of a pod of jobset.yaml: the ranks of one node, by node.sh, and how they ended, as an exit code:
#   0     the training came to its end (of a node other than 0 also: another pod was asked to stop, and all have saved)
#   75    it was stopped before its end, and saved: all pods are to be started again
#   78    nothing was started, for the preflight found an error: no pod is to be started again
#   else  what the launcher or the training ended with
# Variables: those of node.sh; ATTEMPT: how often all pods were started again; CPUS: cores of this pod. ENGINE may be empty.
set -euo pipefail
child='' asked=''
say() { echo "$(date +%FT%T) node $NODE: $*" >&2; }

# Kubernetes sends SIGTERM to this process alone, which as the first of its pod would not even end by it. It goes on to the
# child, and from a launcher to its ranks. A launcher whose ranks have ended waits for those of the other pods, which may be
# gone, and hears nothing for minutes.
# shellcheck disable=SC2329  # the trap's
stop() {
  asked=yes
  say "SIGTERM: asking the ranks to save"
  [ -n "$child" ] || return 0
  local signal=TERM ranks=none
  if [ "$ENGINE" != single ] && [ -e "/proc/$child/task/$child/children" ]; then
    read -r ranks < "/proc/$child/task/$child/children" || true
    [ -n "$ranks" ] || signal=KILL
  fi
  kill -"$signal" "$child" 2> /dev/null || true
}
trap stop TERM

# Run a command to its end; its exit code.
follow() {
  [ -z "$asked" ] || return 143
  "$@" &
  child=$!
  [ -z "$asked" ] || kill -TERM "$child" 2> /dev/null || true  # asked just now
  local code=0 last=0
  while :; do
    wait "$child" && code=0 || code=$?
    kill -0 "$child" 2> /dev/null || break  # a signal ends the wait too
  done
  if [ "$code" -gt 128 ]; then  # perhaps the signal's, which came as the command ended
    wait "$child" 2> /dev/null || last=$?
    [ "$last" = 127 ] || code=$last
  fi
  return "$code"
}

cd "$(dirname "$0")/../.."
: "${NODES:?how many nodes there are}" "${NODE:?which of them this is, from 0}" "${HEAD:?the address of node 0}"
export PROCESSES=${PROCESSES:-1} GRACE=${GRACE:-120}
if [ $((NODES * PROCESSES)) = 1 ]; then ENGINE=${ENGINE:-single}; else ENGINE=${ENGINE:-ddp}; fi
export ENGINE
cpus=$((${CPUS:-1} / PROCESSES))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > 0 ? cpus : 1))}
AAAE_STOPPED=$(mktemp)
export AAAE_STOPPED

# What would fail is said now; the other nodes wait. Not when the pods start again: they are to go on, come what may.
if [ "$NODE" = 0 ] && [ "${ATTEMPT:-0}" = 0 ]; then
  code=0
  follow aaae preflight "$@" --nodes "$NODES" --processes-per-node "$PROCESSES" --engine "$ENGINE" --grace "$GRACE" || code=$?
  [ "$code" = 0 ] || say "nothing was started: the preflight ended with exit code $code"
  [ "$code" != 2 ] || exit 78  # EX_CONFIG
  [ "$code" = 0 ] || exit "$code"
fi

say "$NODES nodes, $PROCESSES processes on each, $ENGINE, start $((${ATTEMPT:-0} + 1))"
code=0
follow launch/node.sh "$@" || code=$?
# Rank 0's word: a single process that is stopped ends with 0, and a launcher that was asked to stop never does.
word=$(cat "$AAAE_STOPPED" 2> /dev/null) || word=''
if [ -n "$word" ] && [ "$word" != 'done' ]; then
  say "stopped and saved before its end: $word"
  exit 75  # EX_TEMPFAIL
fi
[ "$word" != 'done' ] || [ -z "$asked" ] || code=0
say "the training ended with exit code $code"
[ "$code" != 78 ] || code=1  # it would be taken for the preflight's
exit "$code"
