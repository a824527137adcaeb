"""The planner's bytes of a rank are those that a count of all storages finds in a training step."""

import json
from pathlib import Path

import pytest

from megatron.longseq.planner.tools.calibrate import profile_of
from tests.benchmarks.planner_measured import MODEL, PLANS, predict_and_count
from tests.pool import RankPool

# More layers, whose bucket is smaller than the embedding's, and short sequences: the states are most of the memory.
DEEP = f"{MODEL} --num-layers 8 --vocab-size 4096 --seq-length 128 --max-position-embeddings 128 --overlap-grad-reduce"
SMALL_BUCKETS, WIRE = "--paro-group-size 2 --ddp-bucket-size 1000000", "--bf16 --grad-reduce-in-bf16"
SHARDED = {
    "NIG": "--paro NIG --paro-group-size 2",
    "NIG, bf16 on the wire": f"--paro NIG {SMALL_BUCKETS} {WIRE}",
    "NNI, bf16 on the wire": f"--paro NNI {SMALL_BUCKETS} {WIRE}",
    "IIG": "--paro IIG --paro-group-size 2",
    "IGG, PP 2, bf16 on the wire": f"--paro IGG --paro-group-size 2 --pipeline-model-parallel-size 2 {WIRE}",
    "NIG, PP 2, 2 segments": "--paro NIG --paro-group-size 2 --pipeline-model-parallel-size 2 --seq1f1b-splits 2",
    "NGG, PP 2 x 2": "--paro NGG --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    "GGG, bf16": "--paro GGG --bf16",
    "GGG, bf16 on the wire": f"--paro GGG {WIRE}",
    "GGG, 2 units ahead": "--paro GGG --paro-selective-overlap --paro-prefetch-units 2",
}
# Layers enough for some of a virtual stage to be recomputed, and sequences whose activations are most of the memory.
STAGES = f"{MODEL} --num-layers 8 --pipeline-model-parallel-size 2"
FULL, VIRTUAL = "--recompute-granularity full --recompute-method", "--num-virtual-stages-per-pipeline-rank 2"
RECOMPUTED = {
    "1 of 4": f"{FULL} block --recompute-num-layers 1",
    "3 of 4": f"{FULL} block --recompute-num-layers 3",
    "pairs": f"{FULL} uniform --recompute-num-layers 2",
    "1 of 2, V 2": f"{VIRTUAL} {FULL} block --recompute-num-layers 1",
    "1 of 4, 2 segments": f"--seq1f1b-splits 2 {FULL} block --recompute-num-layers 1",
    "3 of 4, 2 segments": f"--seq1f1b-splits 2 {FULL} block --recompute-num-layers 3",
    "1 of 2, V 2, 2 segments": f"{VIRTUAL} --seq1f1b-splits 2 {FULL} block --recompute-num-layers 1",
    "2 of 4, zero bubble": f"--zero-bubble {FULL} block --recompute-num-layers 2",
    "none, zero bubble": "--zero-bubble",
}
QUICK = ("PP 2, 2 segments", "NIG, bf16 on the wire")
PLANS_OF_SIZES = [(ranks, name, f"{MODEL} {words}") for ranks, plans in PLANS.items() for name, words in plans.items()]
CASES = [
    pytest.param(ranks, words, id=f"{ranks}: {name}", marks=() if name in QUICK else pytest.mark.slow)
    for ranks, name, words in [
        *PLANS_OF_SIZES,
        *((4, name, f"{DEEP} {words}") for name, words in SHARDED.items()),
        *((2, name, f"{STAGES} {words}") for name, words in RECOMPUTED.items()),
        (4, "zero bubble, TP 2", f"{STAGES} --zero-bubble --tensor-model-parallel-size 2 --sequence-parallel"),
    ]
]


@pytest.mark.parametrize(("count", "words"), CASES)
def test_predicted_bytes_are_counted(ranks: RankPool, tmp_path: Path, count: int, words: str) -> None:
    measured = {
        "name": "cpu",
        "sms": 1,
        "memory_bytes": 1e10,
        "memory_bandwidth": 1e10,
        "memory_efficiency": 1.0,
        "layer_seconds": 1e-4,
        "products": [[512, 512, 512, 0.05]],
        "attention": [2e10, 2e10],
        "attention_length": 512,
        "messages": [[2, 1 << 20, 1e-3], [2, 16 << 20, 1e-2]],
    }
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(profile_of([measured] * count, "cpu")))
    found, counted = predict_and_count(ranks, count, words.split(), profile)
    assert found.peak_bytes == pytest.approx(counted, rel=0.025)
