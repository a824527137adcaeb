"""What the preflight makes of the facts of several nodes."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron.longseq.preflight import facts
from megatron.longseq.preflight.compare import compare, parameters
from megatron.longseq.preflight.report import Finding, is_good, table, write

ARGS = Namespace(save="/ckpt", num_layers=2, hidden_size=8, ffn_hidden_size=32, padded_vocab_size=100, swiglu=True)


def one_rank(rank: int, **own: Any) -> dict[str, Any]:
    gpu = {"index": 0, "name": "H100", "used_mib": 3.0, "busy_percent": 0.0}
    node = {
        "ranks": 1,
        "gpus": [gpu],
        "interfaces": [],
        "host_address": f"10.0.0.{rank}",
        "storage": {"free": 10**12, "speed": 10**9},
    }
    node.update(own.pop("node", {}))
    base = {"rank": rank, "host": f"n{rank}", "software": {"torch": "2.13"}, "code": "c", "patches": "p", "data": {}}
    return {**base, "node": node, "upstream": [], **own}


def failures(*ranks: dict[str, Any], clocks: dict[str, float] | None = None) -> dict[str, str]:
    found = compare(ranks, clocks or {one["host"]: 100.0 for one in ranks}, ARGS)
    return {one.check: one.detail for one in found if one.result == "FAILED"}


def test_equal_nodes_pass() -> None:
    assert failures(*map(one_rank, range(3))) == {}


@pytest.mark.parametrize(
    ("own", "check", "words"),
    [
        ({"code": "other"}, "code", "n1: other"),
        ({"patches": "other"}, "patches", "n1: other"),
        ({"software": {"torch": "2.11"}}, "versions", "torch: 2.13 on n0, n2, 2.11 on n1"),
        ({"upstream": ["schedules.py is changed"]}, "upstream", "n1: schedules.py is changed (1 in all"),
        ({"node": {"gpus": []}}, "GPUs", "n1 has 0 GPU(s) for 1 ranks"),
        ({"node": {"interfaces": ["NCCL_IB_HCA=x: there is no device x"]}}, "network devices", "n1: NCCL_IB_HCA=x"),
        ({"node": {"host_address": "127.0.1.1"}}, "network devices", "the name of n1 resolves to its loopback"),
        ({"node": {"storage": {"error": "/ckpt cannot be written"}}}, "checkpoint folder", "n1: /ckpt cannot"),
        ({"node": {"storage": {"free": 1000, "speed": 10**9}}}, "checkpoint folder", "left on n1"),
        ({"node": {"storage": {"free": 10**12, "speed": 10**5}}}, "checkpoint folder", "n1 writes 0.1 MB/s"),
    ],
)
def test_a_node_that_differs_is_named(own: dict[str, Any], check: str, words: str, monkeypatch: Any) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    found = failures(one_rank(0), one_rank(1, **own), one_rank(2))
    assert list(found) == [check] and words in found[check], found


def test_a_busy_gpu_clocks_and_data_files() -> None:
    busy = {"gpus": [{"index": 3, "name": "H100", "used_mib": 9000.0, "busy_percent": 90.0}]}
    assert "n1: GPU 3 has 9000 MiB in use" in failures(one_rank(0), one_rank(1, node=busy))["GPUs"]
    assert "n1 is 9.0 s ahead of n0" in failures(one_rank(0), one_rank(1), clocks={"n0": 1.0, "n1": 10.0})["clocks"]
    sizes = [one_rank(0, data={"a.bin": 5}), one_rank(1, data={"a.bin": 6})]
    assert "a.bin differs: 5 bytes on n0, 6 bytes on n1" in failures(*sizes)["data files"]
    missing = [one_rank(0, data={"a.bin": 5}), one_rank(1, data={"a.bin": "No such file or directory"})]
    assert failures(*missing)["data files"] == "a.bin on n1: No such file or directory"


@pytest.mark.parametrize(
    ("visible", "indices"),
    [(None, [0, 1, 2]), ("1,2", [1, 2]), ("GPU-b", [1]), ("", []), ("-1", []), ("MIG-x/7/0", [0, 1, 2])],
)
def test_gpus_of_others_on_the_node_are_left_out(
    visible: str | None, indices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [f"{index}, GPU-{uuid}-4711, NVIDIA H100 80GB HBM3, 70000, [N/A]" for index, uuid in enumerate("abc")]
    monkeypatch.setattr(facts, "_nvidia_smi", lambda fields: listed if fields.startswith("index,uuid") else [])
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu["index"] for gpu in facts.gpus()] == indices
    assert all(gpu["name"] == "NVIDIA H100 80GB HBM3" and gpu["used_mib"] == 70000 for gpu in facts.gpus())


def test_parameters_of_a_dense_model() -> None:
    assert parameters(ARGS) == 2 * (4 * 64 + 3 * 8 * 32) + 100 * 8
    # As the flags are before upstream has made the tokenizer and the model.
    early = {"padded_vocab_size": None, "vocab_size": 97, "make_vocab_size_divisible_by": 5}
    assert parameters(Namespace(**{**vars(ARGS), **early, "tensor_model_parallel_size": 2})) == parameters(ARGS)


def test_network_devices_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("net/eth0", "net/ib0", "infiniband/mlx5_0"):
        (tmp_path / name).mkdir(parents=True)

    def fault(variable: str, value: str) -> bool:
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            return bool(facts.interface_faults(root=tmp_path))

    for good in ("eth", "=eth0", "^lo", "eth0,ib"):
        assert not fault("NCCL_SOCKET_IFNAME", good), good
    assert fault("NCCL_SOCKET_IFNAME", "=eth") and fault("GLOO_SOCKET_IFNAME", "eth")
    assert not fault("NCCL_IB_HCA", "=mlx5_0:1") and fault("NCCL_IB_HCA", "=mlx5_0,mlx5_1")


def test_data_files_of_the_flags(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"12345")
    found = facts.data_files(Namespace(data_path=["0.5", str(tmp_path / "a")]))
    assert found == {str(tmp_path / "a.bin"): 5, str(tmp_path / "a.idx"): "No such file or directory"}


def test_prefixes_are_those_that_upstream_reads(tmp_path: Path) -> None:
    def names(**flags: Any) -> set[str]:
        return {file.removesuffix(".idx") for file in facts.data_files(Namespace(**flags)) if file.endswith(".idx")}

    parts = tmp_path / "parts.json"
    parts.write_text('{"train": "0.3 a 0.7 b", "valid": ["c", "d"], "test": null, "note": ["x"]}')
    assert names(per_split_data_args_path=str(parts)) == {"a", "b", "c", "d"}
    assert names(data_path=["2024"]) == {"2024"}, "a single word is a prefix, also one that looks like a weight"
    assert names(data_path=["0.5", "a", "0.5"]) == {"0.5", "a"}, "an odd number of words has no weights"


def test_conversations_are_a_jsonl_file_or_prepared(tmp_path: Path) -> None:
    chat, prepared = tmp_path / "chat.jsonl", tmp_path / "prepared"
    chat.write_text("{}\n")
    names = [f"{prepared}{part}" for part in (".bin", ".idx", ".json", ".loss_mask.bin", ".loss_mask.idx")]
    for name in names:
        Path(name).write_bytes(b"1234")
    found = facts.data_files(Namespace(data_path=["0.5", str(chat), "0.5", str(prepared)], sft=True))
    assert found == {str(chat): 3, **dict.fromkeys(names, 4)}
    several = facts.data_files(Namespace(data_path=[str(tmp_path / "*.jsonl"), "s3://bucket/chat.jsonl"], sft=True))
    assert several == {str(chat): 3}


def test_files_of_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/vocab.json").write_bytes(b"1234")
    (tmp_path / "parts.json").write_text('{"train": ["0.5", "a"], "valid": null}')
    found = facts.data_files(Namespace(tokenizer_model="tokenizer", vocab_file="/absent", merge_file="name/on-a-hub"))
    assert found == {"tokenizer": 4, "/absent": "No such file or directory"}
    assert set(facts.data_files(Namespace(per_split_data_args_path="parts.json"))) == {"a.bin", "a.idx"}
    local = [one_rank(0, data={}), one_rank(1, data={"tokenizer": 4})]
    assert failures(*local)["data files"] == "tokenizer differs: no such file on n0, 4 bytes on n1"


def test_report(tmp_path: Path) -> None:
    findings = [Finding("one", "ok", "fine"), Finding("two", "FAILED", "word " * 40)]
    lines = table(findings).splitlines()
    assert lines[0].split() == ["one", "ok", "fine"] and max(map(len, lines)) < 120
    assert lines[-1] == "preflight: 1 of 2 checks failed: the launch is refused" and not is_good(findings)
    write(tmp_path / "x.json", findings)
    assert '"passed": false' in (tmp_path / "x.json").read_text()


@pytest.mark.parametrize(("result", "status"), [("ok", 0), ("FAILED", 1)])
def test_every_rank_ends_with_the_status(tmp_path: Path, result: str, status: int) -> None:
    """Without slurm, the launcher of each machine has the status of its own ranks."""
    program = (
        "import sys\n"
        "from megatron.longseq.preflight.report import Finding\n"
        "from patches.entry import preflight\n"
        "preflight.LATER_S = 0.0\n"
        "preflight.finish_preflight(int(sys.argv[1]), [Finding('clocks', sys.argv[2], '')])\n"
    )
    env = {**os.environ, "LONGSEQ_PREFLIGHT_REPORT": str(tmp_path / "preflight.json")}
    for rank in ("0", "1"):
        words = [sys.executable, "-c", program, rank, result]
        assert subprocess.run(words, env=env, capture_output=True, check=False).returncode == status, rank
