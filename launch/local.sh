#!/usr/bin/env bash
# Train without a scheduler, on this machine or, by ssh, on several, all of which see this folder under this path:
#   launch/local.sh configs/celeba64.toml [section.key=value ...]
#   HOSTS="gpu1 gpu2" launch/local.sh configs/celeba64.toml
# HOSTS: names or addresses, the first of which is the one that all meet at. PROCESSES, ENGINE, GRACE, MEET, PORT: as for node.sh.
# VENV: default .venv. SSH: default `ssh`, with options if need be. Each host's log is in logs/local-START/NUMBER-HOST.log, and
# its first one on the terminal too. Ctrl-C or SIGTERM: all save, and end. A host that fails ends the others. The exit code is
# the first that is not 0.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "no configuration; launch/local.sh configs/NAME.toml [section.key=value ...]" >&2; exit 2; }
PATH=$(cd "${VENV:-.venv}" && pwd)/bin:$PATH
export PATH
read -ra hosts <<< "${HOSTS:-}"
if [ ${#hosts[@]} = 0 ]; then
  ENGINE=${ENGINE:-$([ "${PROCESSES:-1}" = 1 ] && echo single || echo ddp)} NODES=1 NODE=0 HEAD=127.0.0.1 exec launch/node.sh "$@"
fi

logs=logs/local-$(date +%Y%m%dT%H%M%S)-$$
mkdir -p "$logs"
read -ra ssh <<< "${SSH:-ssh}"
ssh+=(-o ConnectTimeout=30 -o ServerAliveInterval=5 -o ServerAliveCountMax=3)  # a host that is cut off would be waited for
pids=() inputs=()
hang_up() { local input; for input in "${inputs[@]}"; do exec {input}>&-; done; }
trap hang_up INT TERM HUP
# What each host's ssh reads is held open here: its end, by a signal to this script or by its death, ends the ranks in order.
for number in "${!hosts[@]}"; do
  there=(env "PATH=$PATH" NODES=${#hosts[@]} "NODE=$number" "HEAD=${hosts[0]}" "NEXT=${hosts[1]:-}" "PORT=${PORT:-29500}")
  there+=("PROCESSES=${PROCESSES:-1}" "ENGINE=${ENGINE:-ddp}" "GRACE=${GRACE:-120}" "MEET=${MEET:-900}")
  there+=(launch/node.sh "$@")
  script="cd $(printf %q "$PWD") || exit; $(printf '%q ' "${there[@]}") < /dev/null & node=\$!"
  # shellcheck disable=SC2016  # the number of a process there
  script+='; { cat; kill -TERM $node; } > /dev/null 2>&1 <&0 & wait $node'
  mkfifo "$logs/input"
  exec {both}<> "$logs/input"
  exec {end}< "$logs/input"
  rm "$logs/input"
  inputs+=("$both")
  (
    trap '' INT HUP  # a terminal's come to ssh too, and it would not wait for the ranks to save
    hang_up
    exec "${ssh[@]}" "${hosts[$number]}" "bash -c $(printf %q "$script")" <&"$end" > "$logs/$number-${hosts[$number]}.log" 2>&1
  ) &
  pids+=($!)
  exec {end}<&-
done
echo "${#hosts[@]} hosts (${hosts[*]}), ${PROCESSES:-1} processes on each; logs in $logs" >&2
touch "$logs/0-${hosts[0]}.log"
(trap '' INT HUP; hang_up; exec tail --follow --lines=+1 --pid="${pids[0]}" "$logs/0-${hosts[0]}.log" >&2) &
shown=$! code=0
while [ ${#pids[@]} -gt 0 ]; do
  sleep 1 & wait $! || true  # or until a signal comes
  for number in "${!pids[@]}"; do
    ! kill -0 "${pids[$number]}" 2> /dev/null || continue
    wait "${pids[$number]}" && one=0 || one=$?
    unset "pids[$number]"
    [ "$one" != 0 ] || continue
    echo "${hosts[$number]}: ended with exit code $one; its log is $logs/$number-${hosts[$number]}.log" >&2
    [ "$code" != 0 ] || code=$one
    hang_up  # the others may not see that by themselves
  done
done
wait "$shown" || true
exit "$code"
