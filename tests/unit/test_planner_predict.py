"""The planner's prediction of one configuration: parameters, memory, time, flags and the command."""

import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.longseq.pipeline.plan.generators import make
from megatron.longseq.pipeline.plan.memory import StageBytes, peak_bytes
from megatron.longseq.pipeline.plan.schedule import Pipeline, Schedule
from megatron.longseq.pipeline.plan.simulate import Costs, simulate, uniform_costs
from megatron.longseq.planner.plan.cluster import cluster, families
from megatron.longseq.planner.plan.configuration import reasons
from megatron.longseq.planner.plan.flags import check_names, read, read_fully, upstream_flags
from megatron.longseq.planner.plan.memory import in_flight, stage_params
from megatron.longseq.planner.plan.model import FIELDS as MODEL_FIELDS
from megatron.longseq.planner.plan.model import architecture, names
from megatron.longseq.planner.plan.step import predict, stage_costs
from megatron.longseq.planner.tools.cli import main

BASE: dict[str, Any] = {
    "model": "llama-7b",
    "cluster": "a800-64",
    "seq_length": "8K",
    "global_batch_size": 512,
    "bf16": True,
    "use_distributed_optimizer": True,
}


def price(**changes: Any) -> Any:
    return predict(*read({**BASE, **changes}))


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-7b", 6.738),
        ("llama2-13b", 13.016),
        ("llama-65b", 65.286),
        ("llama2-70b", 68.977),
        ("llama3-8b", 8.030),
        ("llama3-70b", 70.554),
        ("llama3-405b", 405.853),
        ("deepseek-v3", 671.026),
        ("qwen3-8b", 8.191),
    ],
)
def test_parameters_of_built_in_models(name: str, billions: float) -> None:
    assert architecture(name, {}).parameters / 1e9 == pytest.approx(billions, abs=0.0005)  # three decimals


def test_parameters_of_gpt_with_biases() -> None:
    """Equation 2 of arXiv 2104.04473: 12 L h^2 (1 + 13 / 12h + (V + s) / 12 L h), and the last norm."""
    layers, hidden, rows, length = 24, 2304, 51200, 2048
    values = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": 24, "vocab_size": rows}
    found = architecture(None, {**values, "max_position_embeddings": length}).parameters
    assert found == 12 * layers * hidden**2 + 13 * layers * hidden + (rows + length) * hidden + 2 * hidden


def test_every_built_in_model_and_family_is_valid() -> None:
    assert len(names()) > 30
    assert len(families()) >= 10
    for name in names():
        assert architecture(name, {}).parameters > 1e8
    for family in families():
        assert cluster(f"{family}-8").gpus == 8


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("A100-80GB", "a100"),
        ("A100 80GB SXM", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("dgx_a100", "a100"),
        ("a100_40gb", "a100-40g"),
        ("h100_80gb", "h100"),
        ("8xA100", "a100"),
        ("A100 80 GB (NVLink)", "a100"),
        ("A100 x 64", "a100"),
        ("bloom", "jean-zay"),
    ],
)
def test_names_of_clusters(name: str, family: str) -> None:
    assert replace(cluster(name, 8), name="") == replace(cluster(f"{family}-8"), name="")


def test_an_installation_differs_from_its_gpus_in_data_sheets_alone() -> None:
    """The constants that are fitted or measured on products are those of the hardware."""
    fitted = ("product_efficiency", "product_depth", "memory_efficiency", "attention_efficiency", "link_efficiency")
    for name in ("a100-40g", "a800", "a100-4x200", "a100-4x400", "selene", "jean-zay"):
        for number in (*fitted, "layer_seconds", "link_latency", "message_bytes", "step_seconds", "imbalance"):
            assert getattr(cluster(f"{name}-8"), number) == getattr(cluster("a100-8"), number), (name, number)
        # Jean Zay's network has a published measurement of its own.
        assert cluster(f"{name}-8").data_efficiency == (0.101 if name == "jean-zay" else 0.5)


def test_a_hugging_face_config(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, built_in = architecture(str(tmp_path), {}), architecture("llama3-8b", {})
    assert found.parameters == built_in.parameters
    assert architecture("Llama 3 8B", {}) == architecture("llama3_8b", {}) == built_in
    assert len({name.replace("-", "") for name in names()}) == len(names())  # or a name would stand for two models
    assert architecture("meta-llama/Llama-3.1-8B", {}).use_rope_scaling
    with pytest.raises(ValueError, match="no model 'llama-8b': neither a file nor one of"):
        architecture("llama-8b", {})


def test_parameters_of_the_stages_sum_to_the_model() -> None:
    model, _, run = read({**BASE, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4})
    stages = stage_params(model, run)
    norms = model.num_layers * 2 * model.hidden_size + model.hidden_size  # every tensor-parallel rank has all norms
    assert 2 * sum(one.dense for one in stages) == model.parameters + norms


def simulated_bubble(schedule: Schedule, costs: Costs) -> float:
    """Return the seconds in which the slowest rank waits, as the head makes the last stage slowest."""
    timeline = simulate(schedule, costs)
    return timeline.makespan - max(sum(span.end - span.start for span in spans) for spans in timeline.spans)


@pytest.mark.parametrize(
    ("stages", "virtual", "microbatches"), [(4, 1, 8), (8, 1, 4), (4, 2, 8), (4, 3, 16), (2, 4, 6)]
)
def test_pipeline_formulas_are_those_of_the_simulator(stages: int, virtual: int, microbatches: int) -> None:
    """The closed forms of the bubble and of micro-batches in flight, against the pipeline's schedules."""
    model, machine, run = read({**BASE, "gpus": stages, "num_layers": 24, "pipeline_model_parallel_size": stages})
    run = replace(run, num_virtual_stages_per_pipeline_rank=virtual, global_batch_size=microbatches)
    schedule = make(Pipeline(stages, microbatches, 1, virtual))
    unit = [StageBytes(1.0 / virtual, 0.0, 0.0, 0.0)] * stages * virtual
    assert [in_flight(run, stage) for stage in range(stages)] == pytest.approx(peak_bytes(schedule, [1], unit))
    timeline = simulate(schedule, uniform_costs(schedule.pipeline, 1 / virtual, 2 / virtual))
    waits = timeline.makespan - 3 * microbatches
    found = predict(model, machine, run)
    assert waits == pytest.approx((stages - 1) * 3 / virtual)
    assert found.bubble_seconds == pytest.approx(simulated_bubble(schedule, stage_costs(model, machine, run)))


def test_more_of_everything_costs_more() -> None:
    plain, full = price(), price(recompute_granularity="full")
    assert price(seq_length="16K").step_seconds > 2 * plain.step_seconds  # attention grows with the square
    # A product's forward is a third of its seconds, flash attention's 2 / 7. The head is not computed again.
    seconds = plain.breakdown["compute"]
    assert seconds / 4 < full.breakdown["recomputation"] < seconds / 3
    assert full.stages[0]["activations"] == 2 * 32 * 8192 * 4096 < plain.stages[0]["activations"]  # inputs of layers
    assert (
        price(cluster="a800-64,link_bandwidth=50e9", tensor_model_parallel_size=8).step_seconds
        > price(tensor_model_parallel_size=8).step_seconds
    )
    assert price(cluster="a800-64,node_bandwidth=5e9").exposed["data"] > plain.exposed["data"]
    assert price(overlap_grad_reduce=True).step_seconds < plain.step_seconds
    assert price(use_distributed_optimizer=False).peak_bytes > plain.peak_bytes + 7e9 * 11
    assert not price(cluster="a800-64,memory_bytes=20e9").fits


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"seq1f1b_splits": 2},
        {"zero_bubble": True, "transformer_impl": "local", "attention_backend": "flash"},
        {"num_virtual_stages_per_pipeline_rank": 2},
        {"seq1f1b_splits": 4, "num_virtual_stages_per_pipeline_rank": 2},
    ],
    ids=str,
)
def test_each_recomputed_layer_saves_memory_and_takes_time(own: dict[str, Any]) -> None:
    """Of 8 layers a stage, none to all are recomputed; the seconds of each kind grow with their number."""
    layout = {"pipeline_model_parallel_size": 4, "tensor_model_parallel_size": 8, "sequence_parallel": True}
    full, block = {"recompute_granularity": "full"}, {"recompute_method": "block"}
    virtual = own.get("num_virtual_stages_per_pipeline_rank", 1)
    numbers = range(1, 8 // virtual + 1)
    some = [price(**layout, **own, **full, **block, recompute_num_layers=number) for number in numbers]
    none, every = price(**layout, **own), price(**layout, **own, **full)
    for kind in ("activations", "working"):
        assert some[-1].stages[0][kind] == pytest.approx(every.stages[0][kind])
    peaks = [sum(found.stages[0].values()) for found in (none, *some)]
    saved = [before - after for before, after in itertools.pairwise(peaks)]
    assert min(saved) > 0 and max(saved[:-1]) == pytest.approx(min(saved[:-1]), rel=0.1)
    for kind in ("recomputation", "tensor"):
        seconds = [found.breakdown[kind] for found in (none, *some)]
        steps = [after - before for before, after in itertools.pairwise(seconds)]
        assert min(steps) > 0 and max(steps) == pytest.approx(min(steps)) and seconds[-1] == every.breakdown[kind]
    for found in (*some, every):
        assert found.breakdown["compute"] == pytest.approx(none.breakdown["compute"])


def test_float32_has_no_tensor_cores_but_in_transformer_engine() -> None:
    """TransformerEngine's linear layers use TF32. Fused attention needs 16 bits, so scores are kept."""
    narrow, wide, local = price(), price(bf16=False), price(bf16=False, transformer_impl="local")
    machine = cluster("a800-64")
    assert wide.tflops_per_gpu < machine.peak_tflops / 2 < narrow.tflops_per_gpu
    assert local.tflops_per_gpu < machine.fp32_peak_tflops < wide.tflops_per_gpu
    assert wide.stages[0]["activations"] > 2 * narrow.stages[0]["activations"] + 4 * 32 * 32 * 8192**2 / 2


def test_breakdown_sums_to_the_step_and_memory_to_the_peak() -> None:
    found = price(pipeline_model_parallel_size=4, context_parallel_size=2, tensor_model_parallel_size=2)
    assert sum(found.breakdown.values()) == pytest.approx(found.step_seconds)
    assert max(sum(kinds.values()) for kinds in found.stages) == found.peak_bytes
    tokens = 512 * 8192
    assert found.tokens_per_second_per_gpu == pytest.approx(tokens / found.step_seconds / 64)
    assert found.mfu_full > found.mfu > 0


def test_segments_and_zero_bubble_shorten_the_bubble() -> None:
    found = []
    for own in ({}, {"seq1f1b_splits": 4}, {"zero_bubble": True}):
        changes = {"pipeline_model_parallel_size": 8, "global_batch_size": 128, **own}
        model, machine, run = read({**BASE, **changes})
        costs = stage_costs(model, machine, run)
        pipeline = Pipeline(8, run.microbatches, run.seq1f1b_splits)
        schedule = make(pipeline, zero_bubble=run.zero_bubble, costs=costs)
        found.append((price(**changes), simulated_bubble(schedule, costs)))
    (plain, waits), (split, split_waits), (zero, zero_waits) = found
    assert plain.bubble_seconds == pytest.approx(waits) and split.bubble_seconds == pytest.approx(split_waits)
    assert split.bubble_seconds < plain.bubble_seconds and split.peak_bytes < plain.peak_bytes
    # The planner rounds the share of weight gradients to tenths, so by 0.05 at most; the bubble has it twice.
    assert abs(zero.bubble_seconds - zero_waits) <= 2 * 0.05 * plain.bubble_seconds
    assert zero.bubble_seconds < plain.bubble_seconds


def test_sharding_strategies_trade_memory_for_messages() -> None:
    by_name = {name: price(paro=name, overlap_grad_reduce=True) for name in ("NNN", "NNG", "NIG", "IIG", "GGG")}
    sizes = [by_name[name].peak_bytes for name in ("NNN", "NNG", "NIG", "IIG")]
    assert sizes == sorted(sizes, reverse=True)
    messages = {name: one.exposed["data"] + one.hidden["data"] for name, one in by_name.items()}
    assert messages["NNG"] < messages["NIG"] < messages["IIG"]


def test_invalid_runs_have_reasons() -> None:
    def why(**changes: Any) -> str:
        model, _, run = read({**BASE, **changes})
        return "; ".join(reasons(model, run))

    assert why() == ""
    assert "does not divide 32 heads" in why(tensor_model_parallel_size=64)
    assert "cannot be divided into replicas of 1 x 7 x 1" in why(pipeline_model_parallel_size=7)
    assert "not a multiple of micro_batch_size x data-parallel size" in why(global_batch_size=100)
    assert "32 layers cannot be divided among 64 stages" in why(pipeline_model_parallel_size=64)
    assert "give --paro NII" in why(paro="NIN")
    assert "Ulysses 3 x ring 1" in why(
        context_parallel_size=4, cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes="3 1"
    )


def test_flags_are_upstreams(upstream_parser: Any) -> None:
    """Every flag of upstream is modelled, neutral or refused, and its spellings are known."""
    from megatron.longseq.planner.plan.configuration import FIELDS

    listed = upstream_flags()
    actions = {action.dest: action for action in upstream_parser._actions if action.dest != "help"}
    modelled = (set(FIELDS) | set(MODEL_FIELDS)) & set(actions)
    groups = [set(listed["neutral"]), set(listed["refused"]), modelled]
    assert set().union(*groups) == set(actions)
    assert sum(map(len, groups)) == len(actions)
    for name, default in listed["refused"].items():
        assert default == actions[name].default
    for name, choices in listed["choices"].items():
        assert choices == [getattr(one, "name", one) for one in actions[name].choices]
    for spelling, name in {**listed["spelled"], **listed["negated"]}.items():
        assert f"--{spelling.replace('_', '-')}" in {o.replace("_", "-") for o in actions[name].option_strings}, (
            spelling
        )


def test_every_flag_of_this_project_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    from megatron.longseq.arguments import add_longseq_arguments

    parser = add_longseq_arguments(argparse.ArgumentParser())
    check_names([action.dest for action in parser._actions if action.dest != "help"])
    flags = "--model llama-7b --cluster a100-8 --seq-length 4096 --flexsp"
    assert main(["predict", *flags.split()]) == 1
    assert "flexsp: its steps depend on the lengths of documents" in capsys.readouterr().err


@pytest.fixture(scope="module")
def upstream_parser() -> Any:
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "rows.csv"
    head = ["gpus", "cluster", "model", "num_layers", "seq-length", "--global-batch-size", "tensor_model_parallel_size"]
    head += ["bf16", "swiglu", "disable_bias_linear", "lr", "sequence_parallel"]
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerow([8, "a100", "llama-7b", "", 4096, 64, 2, "true", "", "", "1e-4", "True"])
        writer.writerow([8, "a100", "llama-7b", 16, 4096, 64, 2, "true", "", "", "", "True"])
        writer.writerow([8, "a100", "llama-7b", 8, 4096, 64, 2, "true", "", "", "", "True"])
    assert main(["predict", "--rows", str(table), "--json"]) == 0
    full, half, quarter = json.loads(capsys.readouterr().out)
    assert {"step_seconds", "tokens_per_second_per_gpu", "tflops_per_gpu", "peak_gb", "fits"} <= set(full)
    by_layers = full["step_seconds"] - half["step_seconds"], half["step_seconds"] - quarter["step_seconds"]
    assert by_layers[0] == pytest.approx(2 * by_layers[1])  # of 16 and of 8 layers
    assert main(["predict", "--rows", str(table)]) == 0
    assert capsys.readouterr().out.count("\n") == 5


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("hidden_siz", "1", "unknown columns or flags: 'hidden_siz' (did you mean hidden_size?)"),
        ("mtp_num_layers", "1", "line 2: mtp_num_layers '1': the planner does not model it"),
        ("tensor_model_parallel_size", "two", "line 2: tensor_model_parallel_size is 'two', not a whole number"),
        ("bf16", "maybe", "line 2: bf16 is 'maybe'; give true or false"),
        ("micro_batch_size", "0", "line 2: micro_batch_size is '0'; give at least 1"),
        ("gpus", "1e999", "line 2: gpus is '1e999', not a whole number"),
        ("num_query_groups", "-4", "line 2: num_query_groups is '-4'; give 0 or more"),
        ("recompute_granularity", "ful", "line 2: recompute_granularity is 'ful'; give one of full, selective"),
        ("cp_comm_type", "p2p a2a", "line 2: cp_comm_type is 'p2p a2a'; the planner prices one type for all layers"),
        ("seq-length", "8192", "line 2: seq-length '8192': another flag says seq_length '4096'"),
        ("cluster", "a1000-8", "no cluster 'a1000-8': neither a file nor FAMILY-GPUS with one of"),
    ],
)
def test_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str, value: str, message: str) -> None:
    cells = {"gpus": "8", "cluster": "a100", "model": "llama-7b", "seq_length": "4096", column: value}
    table = tmp_path / "rows.csv"
    table.write_text(",".join(cells) + "\n" + ",".join(cells.values()) + "\n")
    assert main(["predict", "--rows", str(table)]) == 1
    assert message in capsys.readouterr().err


def test_a_row_that_cannot_be_priced_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "rows.csv"
    rows = ("A100 80GB,8,llama-7b,4096,nan", "a100,8,llama-7b,4096,2x", "a1000,8,llama-7b,4096,", "a100,8,,4096,")
    table.write_text("cluster,gpus,model,seq_length,tensor_model_parallel_size\n" + "\n".join(rows) + "\n")
    assert main(["predict", "--rows", str(table), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [one["step_seconds"] is not None for one in found] == [True, False, False, False]
    assert [one.get("error", "").count("line") for one in found] == [0, 1, 1, 1]
    assert "line 3: tensor_model_parallel_size is '2x', not a whole number" in printed.err
    assert main(["predict", "--rows", str(table)]) == 0
    assert "no cluster 'a1000'" in capsys.readouterr().out


def test_cells_as_programs_write_them() -> None:
    plain = price(global_batch_size=1024, tensor_model_parallel_size=2, sequence_parallel=True)
    cells = {"global_batch_size": "1,024", "tensor_model_parallel_size": "2.0", "sequence_parallel": "1.0"}
    cells |= {"recompute_granularity": "None", "num_query_groups": "nan", "cp_comm_type": "['p2p']", "lr": "-"}
    assert price(**cells) == plain
    stages = {"pipeline_model_parallel_size": 4, "normalization": "rmsnorm"}
    by_layers = price(num_layers_per_virtual_pipeline_stage=4, pipeline_model_parallel_size=4)
    assert price(virtual_pipeline_model_parallel_size=2, **stages) == by_layers


def test_tables_that_are_no_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, row = tmp_path / "rows.csv", "8,a100,llama-7b,4096"
    for text, message in (
        ("gpus,cluster,gpus\n8,a100,16\n", "more than one column gpus"),
        ("gpus,cluster\n,\n", "no rows"),
        (f"gpus,cluster,model,seq_length,\n{row},5\n", "line 2: '5' is in a column without a name"),
        (f"gpus,cluster,model,seq_length\n{row},5\n", "line 2: more cells than columns"),
    ):
        table.write_text(text)
        assert main(["predict", "--rows", str(table)]) == 1
        assert message in capsys.readouterr().err
    table.write_bytes(f"\ufeffgpus,cluster,model,seq_length,\n,,,,\n{row},\n".encode())
    assert main(["predict", "--rows", str(table), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_what_no_flag_says_is_assumed_and_reported() -> None:
    """The vocabulary, and the software of runs in fp16 on A100; a data-parallel size that contradicts the others."""
    sizes = {"num_layers": 12, "hidden_size": 1024, "num_attention_heads": 16, "seq_length": 1024, "cluster": "a100-8"}
    found = read_fully({**sizes, "bf16": True})
    assert found.model.vocab_size == 50257 and len(found.assumed) == 1
    assert read_fully({**sizes, "bf16": True, "vocab_size": 32000}).assumed == ()
    early = read_fully({**sizes, "fp16": True, "vocab_size": 32000})
    assert early.run.is_local and not early.run.fused_attention and not early.cluster.overlaps_input_gradients
    assert "Megatron of 2021" in early.assumed[0]
    for change in (
        {"transformer_impl": "transformer_engine"},
        {"attention_backend": "flash"},
        {"use_flash_attn": True},
        {"bf16": True},
        {"cluster": "h100-8"},
        {"cluster": "vtrain-8"},
    ):
        assert read_fully({**sizes, "fp16": True, "vocab_size": 32000, **change}).assumed == ()
    other = read_fully({**sizes, "bf16": True, "data_parallel_size": 4})
    assert other.contradictions == ("data_parallel_size is 4, but 8 GPUs in replicas of 1 are 8",)


def test_a_shortened_model_keeps_its_share_of_dense_layers() -> None:
    assert architecture("deepseek-v3", {}).moe_layer_freq == (0,) * 3 + (1,) * 58
    assert architecture("deepseek-v3", {"num_layers": 4}).moe_layer_freq == (0, 1, 1, 1)
    assert architecture("deepseek-v2", {"num_layers": 2}).moe_layer_freq == (0, 1)
    assert price(model="deepseek-v2", num_layers=4, expert_model_parallel_size=8).step_seconds > 0
    with pytest.raises(ValueError, match="moe_layer_freq lists 3 layers of 4"):
        architecture("deepseek-v3", {"num_layers": 4, "moe_layer_freq": (0, 1, 1)})


def test_one_run_with_upstreams_flags(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--model llama3-8b --cluster a800 --gpus 8 --bf16 --seq-length 8192 --global-batch-size 512"
    flags += " --use-distributed-optimizer --pipeline-model-parallel-size 2 --cp-comm-type p2p --lr 1e-4"
    assert main(["predict", *flags.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert len(found["stages"]) == 2
    assert main(["predict", *flags.split()]) == 0
    text = capsys.readouterr().out
    assert f"{found['step_seconds']:.4g} s" in text
    assert main(["predict", *flags.split(), "--unknown-flag", "1"]) == 1
    assert "'--unknown-flag'" in capsys.readouterr().err
