#!/usr/bin/env bash
# Run a command as two processes of one program on this machine, to try out what a cluster does:
#
#     scripts/two_processes.sh python run.py --experiment=train_generator --workdir=runs/two
#
# The command gets --coordinator_address, --num_processes and --process_id. Each process has a GPU of
# its own where there are two (CUDA_VISIBLE_DEVICES); JAX_PLATFORMS=cpu keeps both on the CPU. What
# process 1 prints is marked. The exit code is that of the process that failed first.
set -euo pipefail
if [ $# -eq 0 ]; then
  echo "usage: $0 COMMAND..." >&2
  exit 2
fi

# Free a moment ago; nobody else is likely to take it now.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
group=(--coordinator_address="127.0.0.1:$port" --num_processes=2)

CUDA_VISIBLE_DEVICES=0 "$@" "${group[@]}" --process_id=0 &
first=$!
CUDA_VISIBLE_DEVICES=1 "$@" "${group[@]}" --process_id=1 > >(sed 's/^/[1] /') 2> >(sed 's/^/[1] /' >&2) &
second=$!

# Told to stop, both are told: they save and leave together.
trap 'kill -TERM "$first" "$second" 2>/dev/null || true' TERM INT

running() { kill -0 "$1" 2>/dev/null; }
while running "$first" && running "$second"; do sleep 0.2 || true; done
ended=$first other=$second
if running "$first"; then ended=$second other=$first; fi
code=0 rest=0
wait "$ended" || code=$?
if [ "$code" -ne 0 ]; then
  # The other one waits for it, perhaps where it hears no signal; at 143 it is on its way out.
  [ "$code" -eq 143 ] || kill -TERM "$other" 2>/dev/null || true
  for _ in $(seq 100); do if running "$other"; then sleep 0.2 || true; fi; done
  kill -KILL "$other" 2>/dev/null || true
fi
while running "$other"; do sleep 0.2 || true; done
wait "$other" || rest=$?
exit $((code ? code : rest))
