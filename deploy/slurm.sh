#!/usr/bin/env bash
#SBATCH --job-name=lmcot
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
#
# A run of lmcot on nodes of a Slurm cluster: see docs/cluster.md.
#
#   sbatch deploy/slurm.sh configs/mine.yaml /shared/runs/mine [key.sub=value ...]
#
# The first node is the head and the learner's, the others sample and hold the frozen LM. Five minutes
# before the time is up the run writes a checkpoint; the same command goes on from there.
set -euo pipefail
config=${1:?the settings, a YAML file}
run_dir=${2:?the run directory, on a file system that all nodes see}
shift 2

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname -I | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000))
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(openssl rand -hex 32)
export RAY_AUTH_TOKEN
cpus=${SLURM_CPUS_PER_TASK:-1}

start() { # node, resources, further options of ray start
    srun --nodes=1 --ntasks=1 -w "$1" ray start --block --num-cpus "$cpus" \
        --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --resources "$2" \
        --temp-dir "${TMPDIR:-/tmp}/ray-$SLURM_JOB_ID" "${@:3}" &
}

start "$head" '{"learner": 1, "driver": 1}' --head --node-ip-address "$address" --port "$port"
until ray status --address "$address:$port" >/dev/null 2>&1; do sleep 2; done
for node in "${nodes[@]:1}"; do
    start "$node" '{"rollout": 1, "frozen": 1, "reward": 16}' --address "$address:$port"
done

RAY_ADDRESS=$address:$port lmcot train --config "$config" --run-dir "$run_dir" \
    actors.autoscaling=true "$@" &
driver=$!
trap 'kill -TERM "$driver"' TERM
wait "$driver" || wait "$driver"
