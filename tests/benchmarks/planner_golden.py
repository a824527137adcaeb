"""Published measurements as rows of flags: what a planner should predict.

Every file in `megatron/longseq/planner/data/golden` keeps the columns of its source. The functions here turn its rows
into upstream's flags, so that a file with further rows of the same source can be read too (`--golden FOLDER`).
"""

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

_FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_OLD = {**_FULL, "transformer_impl": "local", "attention_backend": "unfused"}


@dataclass(frozen=True)
class GoldenRow:
    """One measurement.

    Attributes:
        family: rows that are judged together.
        name: the row in its source.
        values: the run as flags.
        seconds: measured seconds of a step; None: not measured.
        tflops_full: measured TFLOP/s per GPU that count all scores, where the source has no seconds.
        peak_bytes: measured peak of allocated bytes; None: not measured.
        last_stage: whether `peak_bytes` is that of the last pipeline stage, not of the fullest rank.
        is_oom: whether the run ended out of memory.
        is_consistent: whether it is within 5 % of the smallest peak of rows with the same flags. Others kept more for a
            reason that the source does not list.
        group: runs of one model, cluster and batch, from which a planner chooses.
    """

    family: str
    name: str
    values: dict[str, Any]
    seconds: float | None = None
    tflops_full: float | None = None
    peak_bytes: float | None = None
    last_stage: bool = False
    is_oom: bool = False
    is_consistent: bool = True
    group: tuple[Any, ...] = field(default=())


def _vtrain(row: dict[str, str]) -> GoldenRow:
    values = {
        "gpus": row["# GPUs"],
        "cluster": "vtrain",
        "num_layers": row["# layers"],
        "hidden_size": row["hidden size"],
        "num_attention_heads": row["attention heads"],
        "vocab_size": 50257,
        "seq_length": row["sequence length"],
        "micro_batch_size": row["micro batch"],
        "global_batch_size": row["global batch"],
        "tensor_model_parallel_size": row["tensor parallelism"],
        "pipeline_model_parallel_size": row["pipeline parallelism"],
        "fp16": True,
        **_OLD,
    }
    size = row.get("Parameters (billion)", "")
    group = ("vtrain", row["hidden size"], row["# layers"], row["# GPUs"], row["global batch"])
    layout = f"t{row['tensor parallelism']} d{row['data parallelism']} p{row['pipeline parallelism']}"
    name = f"{size}B {row['# GPUs']} GPUs {layout} mbs{row['micro batch']}"
    family = "vtrain" if size else "vtrain_single"
    return GoldenRow(family, name, values, float(row["iteration time (ms)"]) / 1e3, group=group)


def _bloom_batch(row: dict[str, str]) -> int:
    """Return a row's batch: the one that is listed, or the one that its seconds and TFLOP/s agree with.

    The heading of lines 658 and 659 states GBS=512, their column 2048. The formula of TFLOP/s is that of arXiv
    2104.04473.
    """
    hidden, layers, batch = (int(row[name]) for name in ("hidden", "layers", "GBS"))
    if not row["TFLOPs"]:
        return batch
    work = 96.0 * batch * 2048 * layers * hidden**2 * (1 + 2048 / (6 * hidden) + 250880 / (16 * layers * hidden))
    gpus = int(row["Nodes"]) * 8
    share = float(row["Sec/it"]) * float(row["TFLOPs"]) * gpus * 1e12 / work
    if 0.75 < share < 1.33:
        return batch
    replicas = int(row["MBS"]) * max(1, gpus // (int(row["TP"]) * int(row["PP"])))
    return max(1, round(batch * share / replicas)) * replicas


def _bloom(row: dict[str, str]) -> GoldenRow:
    is_oom = row["Sec/it"].strip().upper() == "OOM"
    batch = int(row["GBS"]) if is_oom else _bloom_batch(row)
    values = {
        "gpus": int(row["Nodes"]) * 8,
        "cluster": "jean-zay",
        "num_layers": row["layers"],
        "hidden_size": row["hidden"],
        "num_attention_heads": row["heads"],
        "vocab_size": 250880,
        "position_embedding_type": "none",
        "seq_length": 2048,
        "micro_batch_size": row["MBS"],
        "global_batch_size": batch,
        "tensor_model_parallel_size": row["TP"],
        "pipeline_model_parallel_size": row["PP"],
        "use_distributed_optimizer": True,
        "bf16" if int(row["line"]) >= 899 else "fp16": True,
        **_OLD,
    }
    group = ("bloom", row["hidden"], row["layers"], row["heads"], row["Nodes"], batch, row["Notes"])
    layout = f"d{row['DP']} t{row['TP']} p{row['PP']} mbs{row['MBS']} a{row['heads']}"
    seconds = None if is_oom else float(row["Sec/it"])
    return GoldenRow("bloom", f"line {row['line']} {row['Size']} {layout}", values, seconds, is_oom=is_oom, group=group)


def _sc21(row: dict[str, str]) -> GoldenRow:
    sizes = {key: int(value) for key, value in row.items() if key != "tflops"}
    hidden, layers, batch = sizes["hidden_size"], sizes["num_layers"], sizes["global_batch_size"]
    work = 96.0 * batch * 2048 * layers * hidden**2 * (1 + 2048 / (6 * hidden) + 51200 / (16 * layers * hidden))
    per_stage = sizes.pop("num_layers_per_virtual_pipeline_stage")
    values: dict[str, Any] = {
        **sizes,
        "cluster": "selene",
        "vocab_size": 51200,
        "seq_length": 2048,
        "fp16": True,
        **_OLD,
    }
    if per_stage * sizes["pipeline_model_parallel_size"] < layers:
        values["num_layers_per_virtual_pipeline_stage"] = per_stage
    return GoldenRow("sc21", f"h{hidden} L{layers}", values, work / sizes["gpus"] / float(row["tflops"]) / 1e12)


def _simumax(row: dict[str, str]) -> GoldenRow:
    def number(pattern: str, default: int = 1) -> int:
        found = re.search(pattern + r"(\d+)", row["case"])
        return int(found[1]) if found else default

    tensor, stages, context = number("_tp"), number("pp"), number("_cp")
    layers = int(row["layer_num"])
    replicas = 8 // (tensor * stages * context)
    values: dict[str, Any] = {
        "model": {"deepseekv2": "deepseek-v2", "deepseekv3": "deepseek-v3"}.get(row["model"], row["model"]),
        "num_layers": layers,
        "gpus": 8,
        "cluster": "b200",
        "seq_length": number("seq", 4096),
        "micro_batch_size": 1,
        "global_batch_size": int(row["mbc"]) * replicas,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": stages,
        "context_parallel_size": context,
        "expert_model_parallel_size": number("_ep"),
        "sequence_parallel": True,
        "use_distributed_optimizer": True,
        "bf16": True,
        "cross_entropy_loss_fusion": True,
        "cross_entropy_fusion_impl": "te",
    }
    if row["model"] == "llama3-405b":
        values["num_query_groups"] = 16  # as in SimuMax's scripts; the model itself has 8
    if context > 1:
        values["cp_comm_type"] = "a2a"
    if "deepseek" in row["model"]:
        values |= {"moe_layer_freq": f"([0]*1+[1]*{layers - 1})", "moe_expert_capacity_factor": 1}
    family = "simumax_cp" if context > 1 else "simumax"
    group = ("simumax", row["model"], layers, values["seq_length"], values["global_batch_size"])
    size = float(row["real_alloc_gib"]) * 2**30
    return GoldenRow(family, row["case"], values, float(row["real_ms"]) / 1e3, peak_bytes=size, group=group)


# Flags of NVIDIA's cases that the table has no columns for, by a word of the case's name; from its model_config.yaml.
_CI_FLAGS: dict[str, dict[str, Any]] = {
    "qk_layernorm": {"qk_layernorm": True},
    "cross_entropy_loss_fusion": {"cross_entropy_loss_fusion": True},
    "rope_embeddings": {"position_embedding_type": "rope"},
    "disable_bias_linear": {"add_bias_linear": False},
    "uneven_pipeline": {"decoder_first_pipeline_num_layers": 2, "decoder_last_pipeline_num_layers": 2},
    "tp_pp_sp_tp_overlap": {"tp_comm_overlap": True},
    "uninstall_te": {"masked_softmax_fusion": False},
    "native_fp8": {"fp8_param_gather": True, "normalization": "RMSNorm"},
    "_mla": {
        "multi_latent_attention": True,
        "q_lora_rank": 192,
        "kv_lora_rank": 64,
        "qk_head_dim": 16,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 16,
    },
}
_CI_MEASURED = ("case", "hw", "mem-allocated-bytes", "mem-max-allocated-bytes", "iteration-time")


def _nvidia_ci(row: dict[str, str]) -> GoldenRow:
    values: dict[str, Any] = {key: value for key, value in row.items() if key not in _CI_MEASURED and value != ""}
    values |= {"gpus": 8, "cluster": "a100" if "a100" in row["hw"] else "h100"}
    if "padded-vocab-size" not in values:
        values.setdefault("vocab-size", 50257)
    for word, flags in _CI_FLAGS.items():
        if word in row["case"]:
            values |= flags
    name = f"{row['case'].removeprefix('gpt/')} {row['hw']}"
    size = float(row["mem-max-allocated-bytes"])
    return GoldenRow("nvidia_ci", name, values, peak_bytes=size, last_stage=True)


def _nemo(row: dict[str, str]) -> GoldenRow:
    values: dict[str, Any] = {key: value for key, value in row.items() if value != ""}
    kind, tflops = values.pop("kind"), float(values.pop("tflops"))
    rate = values.pop("tokens_per_second_per_gpu", None)
    values |= {"fp8": "hybrid", "bf16": True, "use_distributed_optimizer": True, "overlap_grad_reduce": True}
    values["grad_reduce_in_bf16"] = True
    values |= {"overlap_param_gather": True, "sequence_parallel": True, "tp_comm_overlap": True}
    values.setdefault("global_batch_size", (1 << 22) // int(values["seq_length"]))
    seconds = None
    if rate:
        tokens = int(values["global_batch_size"]) * int(values["seq_length"])
        seconds = tokens / float(rate) / int(values["gpus"])
    name = f"{values['model']} {values['cluster']} {values['gpus']} GPUs s{values['seq_length']}"
    return GoldenRow(f"nemo_{kind}", name, values, seconds, None if seconds else tflops)


def _flagperf(row: dict[str, str]) -> GoldenRow:
    values: dict[str, Any] = {
        key: value for key, value in row.items() if key not in ("tokens_per_second_per_gpu", "gb")
    }
    values |= {"cluster": "a800", "bf16": True, "sequence_parallel": True, "use_distributed_optimizer": True}
    rate = row["tokens_per_second_per_gpu"]
    seconds = None
    if rate != "OOM":
        seconds = int(row["global_batch_size"]) * int(row["seq_length"]) / float(rate) / int(row["gpus"])
    name = f"{row['model']} t{row['tensor_model_parallel_size']} p{row['pipeline_model_parallel_size']}"
    group = ("flagperf", row["model"], row["gpus"], row["global_batch_size"])
    return GoldenRow("flagperf", name, values, seconds, is_oom=rate == "OOM", group=group)


def _seq1f1b(row: dict[str, str]) -> GoldenRow:
    values: dict[str, Any] = {key: value for key, value in row.items() if key != "tokens_per_second" and value != ""}
    values |= {"cluster": "a100", "bf16": True, "sequence_parallel": True, "attention_backend": "flash"}
    rate, length, batch = row["tokens_per_second"], int(row["seq_length"]), int(row["global_batch_size"])
    virtual, splits = row["num_virtual_stages_per_pipeline_rank"], row["seq1f1b_splits"]
    schedule = "seq1f1b" if splits else "interleaved" if virtual else "1f1b"
    group = ("seq1f1b", length, batch)
    seconds = None if rate == "OOM" else batch * length / float(rate)
    return GoldenRow("seq1f1b", f"s{length} A{batch} {schedule}", values, seconds, is_oom=rate == "OOM", group=group)


_MPT = {"1b": "mpt-1b", "3b": "mpt-3b", "7b": "mpt-7b", "13b": "mpt-13b", "30b": "mpt-30b", "70b": "mpt-70b"}


# These runs had FlashAttention 1. On A100 it reaches 30 to 50 % of the peak in forward and 25 to 35 % in backward; on
# H100, FlashAttention 2 reaches 35 % instead of 73 % (arXiv 2307.08691, sections 1 and 4; 2407.08608, abstract).
_FLASH_1_A100 = "attention_efficiency=0.4,attention_backward_efficiency=0.3"
_FLASH_1_H100 = "attention_efficiency=0.19,attention_backward_efficiency=0.145"
_MOSAIC = {
    "a100_80gb": f"a100-4x400,{_FLASH_1_A100}",
    "a100_40gb": f"a100-40g,{_FLASH_1_A100}",
    "h100_80gb": f"h100,{_FLASH_1_H100}",
}


def _llmfoundry(row: dict[str, str]) -> GoldenRow:
    name = f"{row['model']} {row['gpu']} {row['gpus']} GPUs s{row['seq']} mbs{row['mbs']} ac{row['ac']}"
    cluster = _MOSAIC.get(row["gpu"], row["gpu"])
    values: dict[str, Any] = {
        "model": _MPT.get(row["model"].lower(), f"mpt-{row['model']}"),
        "gpus": row["gpus"],
        "cluster": cluster,
        "seq_length": row["seq"],
        "micro_batch_size": row["mbs"],
        "global_batch_size": row["gbs"],
        "bf16": True,
        "use_torch_fsdp2": True,
        "attention_backend": "flash",
    }
    if row["ac"] == "True":
        values |= _FULL
    if row["prec"].endswith("fp8"):
        values["fp8"] = "hybrid"
    tokens = int(row["gbs"]) * int(row["seq"])
    group = ("llmfoundry", row["model"], row["gpu"], row["gpus"], row["seq"], row["gbs"], row["prec"])
    return GoldenRow("llmfoundry", name, values, tokens / float(row["tok_s"]), group=group)


READERS: dict[str, Callable[[dict[str, str]], GoldenRow]] = {
    "megatron_ci_gpt.csv": _nvidia_ci,
    "simumax_b200.csv": _simumax,
    "vtrain_multi.csv": _vtrain,
    "vtrain_single.csv": _vtrain,
    "bloom_a100_jz.csv": _bloom,
    "sc21.csv": _sc21,
    "nemo.csv": _nemo,
    "flagperf_a800.csv": _flagperf,
    "llmfoundry.csv": _llmfoundry,
    "seq1f1b.csv": _seq1f1b,
}


def rows(folder: Path | None = None) -> list[GoldenRow]:
    """Return the published rows.

    Args:
        folder: a folder with files of the same names and columns; None: those of the package.
    """
    found = list(_read(folder))
    least = {key: min(row.peak_bytes or 0.0 for row in same) for key, same in _by_flags(found).items()}
    return [replace(row, is_consistent=_is_near(row.peak_bytes, least.get(_key(row)))) for row in found]


def _key(row: GoldenRow) -> str:
    return repr(sorted((name, str(value)) for name, value in row.values.items()))


def _by_flags(found: list[GoldenRow]) -> dict[str, list[GoldenRow]]:
    same: dict[str, list[GoldenRow]] = {}
    for row in found:
        if row.peak_bytes:
            same.setdefault(_key(row), []).append(row)
    return same


def _is_near(size: float | None, least: float | None) -> bool:
    return size is None or least is None or size / least - 1 <= 0.05


def _read(folder: Path | None) -> Iterator[GoldenRow]:
    """Yield the rows of all files that are there."""
    own = resources.files("megatron.longseq.planner").joinpath("data/golden")
    for name, reader in READERS.items():
        file = folder / name if folder is not None else own.joinpath(name)
        if not file.is_file():
            continue
        with file.open() as text:
            for row in csv.DictReader(text):
                yield reader({key: value or "" for key, value in row.items()})
