#!/usr/bin/env bash
# One machine: a run in one process on all local devices, or in several, started again for as long as it asks for that.
#
#   experiments/launch/local.sh train --config=configs/digits.py --workdir=runs/digits
#   PROCESSES=4 experiments/launch/local.sh train --config=configs/digits.py --workdir=runs/digits
#
# PROCESSES  how many; default 1. With more, process i gets local device i (JAX_LOCAL_DEVICE_IDS), and they find each
#            other through a free port of this machine.
# RESTARTS   how often to start again; default 100.
# PAUSE      seconds before that; default 10.
# DIFFJAX    the program; default "python -m diffjax".
#
# Starts again when every process ended with 0, with 75 (interrupted, or another process was lost) or by a signal, and
# not all with 0. Any other code is an error that a restart would meet again: it ends the script with that code. SIGTERM
# or SIGINT to the script, or a Ctrl-C, stops the run: it saves, and the script ends with 75.
set -u

processes=${PROCESSES:-1} restarts=${RESTARTS:-100} pause=${PAUSE:-10}
read -r -a program <<<"${DIFFJAX:-python -m diffjax}"
pids=() stopped=0

stop() {
  stopped=1
  if ((${#pids[@]})); then kill -TERM "${pids[@]}" 2>/dev/null; fi
}
trap stop TERM INT

if (($# == 0)); then
  sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "$0" >&2
  exit 2
fi

for ((attempt = 0; ; attempt++)); do
  pids=()
  port=$((20000 + RANDOM % 12000)) # below the ports that systems hand out themselves
  for ((i = 0; i < processes; i++)); do
    if ((processes == 1)); then
      "${program[@]}" "$@" &
    else
      DIFFJAX_COORDINATOR="127.0.0.1:$port" DIFFJAX_NUM_PROCESSES=$processes DIFFJAX_PROCESS_ID=$i \
        JAX_LOCAL_DEVICE_IDS=$i "${program[@]}" "$@" &
    fi
    pids+=($!)
  done
  # A signal that came before all of them were there has not reached all.
  if ((stopped)); then kill -TERM "${pids[@]}" 2>/dev/null; fi

  codes=() failed=0 again=0
  for pid in "${pids[@]}"; do
    # A signal to this script ends `wait` early.
    wait "$pid"
    code=$?
    while kill -0 "$pid" 2>/dev/null; do
      wait "$pid"
      code=$?
    done
    codes+=("$code")
    if ((code == 75 || code > 128)); then
      again=1
    elif ((code)); then
      failed=$code
    fi
  done

  if ((failed)); then exit "$failed"; fi
  if ((!again)); then exit 0; fi
  if ((stopped)); then exit 75; fi
  if ((attempt >= restarts)); then
    echo "local.sh: ended with ${codes[*]}; giving up after $restarts restarts" >&2
    exit 75
  fi
  echo "local.sh: ended with ${codes[*]}; starting again ($((attempt + 1)) of $restarts)" >&2
  sleep "$pause" &
  pids=($!)
  wait "$!"
  if ((stopped)); then exit 75; fi
done
