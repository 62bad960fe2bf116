# Sourced by the job scripts. `run_and_requeue COMMAND…` runs a command that saves when it gets SIGTERM, as every stage does.
#
# SLURM sends USR1 to the batch script alone (`--signal=B:USR1@300`), not to the steps: the script passes it on as SIGTERM, waits until
# the stage has saved, and puts the job back into the queue. The same command then goes on where it stopped.
set -euo pipefail
export ACCELERATE_CONFIG FIRST_NODE
FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

run_and_requeue() {
  local asked=0 code=0
  "$@" &
  local child=$!
  trap 'asked=1; kill -TERM "$child"' USR1
  trap 'kill -TERM "$child"' TERM INT            # scancel: save, but do not come back
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do         # a trapped signal ends `wait` before the child has ended
    code=0
    wait "$child" || code=$?
  done
  if [ "$asked" = 1 ] && [ "$code" != 0 ]; then
    echo "The time limit is near: saved, and queued again."
    scontrol requeue "$SLURM_JOB_ID"
    return 0
  fi
  return "$code"
}
