#!/bin/bash
# On each node: bash examples/many_nodes/elastic.sh HEAD configs/large.json [--set KEY=VALUE ...]
#
# HEAD is the name of one of the nodes. 48 to 64 nodes train. When a node is lost, the remaining nodes restart from the
# last checkpoint, with the same global batch. When a node joins, all nodes restart, including the new one.
# A node can join because TORCH_DISABLE_SHARE_RDZV_TCP_STORE is set: otherwise, torchrun does not tell the new node the
# address of rank 0, and the job ends with an error after 60 s.

head=$1 config=$2
shift 2
ulimit -n "$(ulimit -Hn)"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes 48:64 --nproc-per-node 8 --max-restarts 100 --rdzv-backend c10d --rdzv-endpoint "$head:29400" \
  --rdzv-id m3ae --rdzv-conf last_call_timeout=15 m3ae_fast/train.py --config "$config" --resume auto "$@"
