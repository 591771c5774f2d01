#!/bin/bash
# A Ray cluster inside one Slurm job, then the command on its first node:
#
#   sbatch --nodes=8 slurm.sh cxrfast cache /shared/mimic --shards 64 --cluster auto
#   sbatch --nodes=8 slurm.sh cxrfast sweep cache/mimic.shards.json --cluster auto
#
# A job that ends at its time limit is interrupted like any command: submit the same line again and it goes on.
#SBATCH --job-name=cxr-fast
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=128
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

# The environment lies on a file system that all nodes see, so that all run the same versions.
source "${CXR_FAST_ENV:-/shared/cxr-fast/.venv}/bin/activate"
(($#)) || { echo "usage: sbatch --nodes=N slurm.sh cxrfast ... --cluster auto" >&2; exit 2; }

# This script runs on the job's first node. The port differs from job to job, should two share a node; Ray's workers
# use 10002 to 19999.
head=$(getent ahostsv4 "$SLURMD_NODENAME" | awk '$1 !~ /^127[.]/ {print $1; exit}')
[[ $head ]] || { echo "no address of $SLURMD_NODENAME that other nodes could reach" >&2; exit 1; }
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS="$head:$port" RAY_USAGE_STATS_ENABLED=0
# Whoever reaches a Ray cluster runs code as its owner, so this one is closed to all but this job.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
# Since Slurm 22.05 srun no longer takes this from the job.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
lent=(--num-cpus="$SRUN_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats --block)

# In the background, for as long as the job lasts; Slurm ends them with it.
srun --nodes=1 --ntasks=1 --overlap --nodelist="$SLURMD_NODENAME" \
    ray start --head --node-ip-address="$head" --port="$port" --include-dashboard=false "${lent[@]}" &
tries=0
until ray health-check --address "$RAY_ADDRESS" >/dev/null 2>&1; do
    ((++tries < 60)) || { echo "Ray's head does not answer at $RAY_ADDRESS" >&2; exit 1; }
    sleep 2
done
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others > 0)); then
    srun --nodes="$others" --ntasks="$others" --overlap --exclude="$SLURMD_NODENAME" \
        ray start --address="$RAY_ADDRESS" "${lent[@]}" &
fi
# Nodes that come later are used too; waiting lets the plan count them.
python - "$SLURM_JOB_NUM_NODES" <<'PYTHON'
import sys
import time

import ray

ray.init(log_to_driver=False)
until = time.monotonic() + 300
while (alive := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[1]) and time.monotonic() < until:
    time.sleep(2)
print(f"{alive} of {sys.argv[1]} nodes", flush=True)
PYTHON

# Slurm's signal, two minutes before the time is over, goes on to the command, which then stops where it can go on.
"$@" &
command=$! stopped="" code=0
trap 'stopped=1; kill -TERM "$command"' TERM
wait "$command" || code=$?
# The signal ended the wait, not yet the command.
if [[ $stopped ]]; then
    code=0
    wait "$command" || code=$?
fi
exit "$code"
