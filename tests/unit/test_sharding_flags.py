"""The flags of PaRO: the upstream flags that they set, the default group, and the combinations that are refused."""

import math
import os
import sys
from argparse import Namespace
from typing import Any

import pytest
import torch

from megatron.longseq.sharding.arguments import (
    INSTEAD,
    NOT_WITH_COPIES_OF_OPTIMIZER_STATES,
    NOT_WITH_PARO,
    NOT_WITH_SHARDED_GRADIENTS,
    NOT_WITH_SHARDED_PARAMETERS,
    check_sharding_numbers,
    prefetch_units,
    refuse_unserved_sharding,
    wants_sharding,
)
from megatron.longseq.sharding.plan.collectives import CollectivesMode
from megatron.longseq.sharding.plan.from_args import (
    ShardingPlan,
    check_unchanged,
    data_parallel_ranks,
    members,
    resolve,
    sharding_plan,
    summary,
    widths,
)
from megatron.longseq.sharding.plan.memory import Widths
from megatron.longseq.sharding.plan.rank_groups import RankGroups
from megatron.longseq.sharding.plan.strategy import RUNNING, VALID, Strategy
from tests.distributed.flags import TINY, TP2, flags
from tests.pool import RankPool
from tests.unit.test_pipeline_flags import args as parsed

EXPERTS = "different data-parallel groups"

# Every way to ask for what no sharding can serve: (flag in the message, values, why)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("--num-distributed-optimizer-instances", {"num_distributed_optimizer_instances": 2}, "third letter"),
    ("--use-megatron-fsdp", {"use_megatron_fsdp": True}, "GGG, IIG and III"),
    ("--use-torch-fsdp2", {"use_torch_fsdp2": True}, "GGG and NGG"),
    *[
        ("--optimizer", {"optimizer": name}, "adam only")
        for name in ("sgd", "muon", "dist_muon", "lion", "soap", "adaptive_muon")
    ],
    ("--use-precision-aware-optimizer", {"use_precision_aware_optimizer": True}, "upstream's buffers"),
    ("--optimizer-cpu-offload", {"optimizer_cpu_offload": True}, "not synchronized"),
    ("--freeze-all-layers", {"freeze_all_layers": True}, "--train-only"),
    ("--fp8-param-gather", {"fp8_param_gather": True}, "quantized parameters"),
    ("--fp4-param-gather", {"fp4_param_gather": True}, "quantized parameters"),
    ("--reuse-grad-buf-for-mxfp8-param-ag", {"reuse_grad_buf_for_mxfp8_param_ag": True}, "sharded separately"),
    ("--use-nccl-ub", {"nccl_ub": True}, "registered memory"),
    ("--use-sharp", {"use_sharp": True}, "upstream's process groups"),
    ("--create-all-gather-group", {"create_all_gather_group": True}, "leave it out"),
    ("--cuda-graph-impl", {"cuda_graph_impl": "local"}, "graph"),
    ("--cuda-graph-impl", {"optimizer_cuda_graph": True}, "graph"),
    ("--grad-reduce-in-bf16", {"grad_reduce_in_bf16": True}, "without --bf16"),
    (
        "--ddp-reduce-scatter-with-fp32-accumulation",
        {"ddp_reduce_scatter_with_fp32_accumulation": True},
        "--grad-reduce-in-bf16 sends bf16",
    ),
    (
        "--ddp-param-name-patterns-for-fp32-local-accumulation",
        {"ddp_param_name_patterns_for_fp32_local_accumulation": ["all"]},
        "--accumulate-allreduce-grads-in-fp32",
    ),
    (
        "--overlap-param-gather-with-optimizer-step",
        {"overlap_param_gather_with_optimizer_step": True},
        "splits the optimizer in two",
    ),
    ("--tensor-parallel-num-weight-shards", {"gtp_weight_remat_size": 2}, "its own sharding"),
    ("--expert-tensor-parallel-num-weight-shards", {"expert_gtp_weight_remat_size": 2}, "its own sharding"),
    ("--expert-model-parallel-size", {"expert_model_parallel_size": 2}, EXPERTS),
    ("--expert-tensor-parallel-size", {"expert_tensor_parallel_size": 2}, EXPERTS),
    ("--save-wgrads-interval", {"save_wgrads_interval": 1}, "unsharded gradients"),
    ("--init-model-with-meta-device", {"init_model_with_meta_device": True}, "from the initial values"),
    ("--ckpt-format", {"ckpt_format": "torch"}, "torch_dist"),
    ("--ckpt-format", {"ckpt_format": "fsdp_dtensor"}, "torch_dist"),
    ("--ckpt-convert-format", {"ckpt_convert_format": "torch"}, "torch_dist"),
    ("--non-persistent-ckpt-type local", {"non_persistent_ckpt_type": "local"}, "give global"),
    (
        "--distrib-optim-fully-reshardable-mem-efficient",
        {"distrib_optim_fully_reshardable_mem_efficient": True},
        "order of ranks",
    ),
    ("--perform-rl-step", {"perform_rl_step": True}, "inference"),
    ("--fake-process-group", {"fake_process_group": True}, "nothing is sent"),
]
WITH_SHARDED_GRADIENTS: list[tuple[str, dict[str, Any], str]] = [
    ("--delay-wgrad-compute", {"delay_wgrad_compute": True}, "reduce-scatter"),
    ("--defer-embedding-wgrad-compute", {"defer_embedding_wgrad_compute": True}, "after the last reduce-scatter"),
    ("--zero-bubble", {"zero_bubble": True}, "N in the middle"),
]
WITH_SHARDED_PARAMETERS: list[tuple[str, dict[str, Any], str]] = [
    ("--fp8-format", {"fp8": "hybrid"}, "unsharded copies"),
    ("--fp8-format", {"fp4": "e2m1"}, "unsharded copies"),
    ("--save-params-interval", {"save_params_interval": 1}, "unsharded parameters"),
    ("--log-params-norm", {"log_params_norm": True}, "unsharded parameters"),
    (
        "--check-weight-hash-across-dp-replicas-interval",
        {"check_weight_hash_across_dp_replicas_interval": 1},
        "different shards",
    ),
    ("--load-main-params-from-ckpt", {"load_main_params_from_ckpt": True}, "main parameters"),
]
WITH_COPIES_OF_OPTIMIZER_STATES: list[tuple[str, dict[str, Any], str]] = [
    ("--ddp-average-in-collective", {"ddp_average_in_collective": True}, "end with G"),
]


def args(paro: str, world_size: int = 8, **values: Any) -> Namespace:
    """Return what upstream's parser makes of a command line with --paro."""
    given = parsed(paro=paro, **values)
    given.world_size = world_size
    return given


def refused(given: Namespace) -> list[str]:
    """Return the lines of the refusal, or none."""
    try:
        refuse_unserved_sharding(given)
    except ValueError as error:
        return str(error).splitlines()[1:]
    return []


def assert_refused(paro: str, flag: str, values: dict[str, Any], why: str) -> None:
    lines = refused(args(paro, **values))
    assert len(lines) == 1 and lines[0].startswith(f"  {flag} with --paro {paro}: ") and why in lines[0], lines


@pytest.mark.parametrize(("flag", "values", "why"), REFUSED)
def test_refuses_by_name_and_reason(flag: str, values: dict[str, Any], why: str) -> None:
    for strategy in RUNNING:
        assert_refused(str(strategy), flag, values, why)


@pytest.mark.parametrize(("flag", "values", "why"), WITH_SHARDED_GRADIENTS)
def test_sharded_gradients_refuse_more(flag: str, values: dict[str, Any], why: str) -> None:
    for paro in ("NII", "NIG", "NGG", "GGG"):
        assert_refused(paro, flag, values, why)
    assert refused(args("NNG", **values)) == refused(args("ING", **values)) == []


@pytest.mark.parametrize(("flag", "values", "why"), WITH_SHARDED_PARAMETERS)
def test_sharded_parameters_refuse_more(flag: str, values: dict[str, Any], why: str) -> None:
    for paro in ("III", "ING", "IIG", "IGG", "GGG"):
        assert_refused(paro, flag, values, why)
    assert refused(args("NIG", **values)) == refused(args("NNN", **values)) == []


@pytest.mark.parametrize(("flag", "values", "why"), WITH_COPIES_OF_OPTIMIZER_STATES)
def test_copies_of_optimizer_states_refuse_more(flag: str, values: dict[str, Any], why: str) -> None:
    for paro in ("NNN", "NNI", "NII", "III"):
        assert_refused(paro, flag, values, why)
    assert refused(args("NIG", **values)) == refused(args("GGG", **values)) == []


def test_every_refusal_is_tried() -> None:
    for tried, table in (
        (REFUSED, NOT_WITH_PARO),
        (WITH_SHARDED_GRADIENTS, NOT_WITH_SHARDED_GRADIENTS),
        (WITH_SHARDED_PARAMETERS, NOT_WITH_SHARDED_PARAMETERS),
        (WITH_COPIES_OF_OPTIMIZER_STATES, NOT_WITH_COPIES_OF_OPTIMIZER_STATES),
    ):
        assert {flag for flag, _, _ in tried} == set(table)


def test_all_reasons_are_told_at_once() -> None:
    lines = refused(args("GGG", nccl_ub=True, log_params_norm=True, save_wgrads_interval=1))
    assert [line.split()[0] for line in lines] == ["--save-wgrads-interval", "--use-nccl-ub", "--log-params-norm"]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"overlap_grad_reduce": True, "overlap_param_gather": True, "use_distributed_optimizer": True},
        {"bf16": True, "grad_reduce_in_bf16": True},
        {"fp16": True},
        {"calculate_per_token_loss": True},
        {"expert_tensor_parallel_size": 2, "tensor_model_parallel_size": 2},
        {"num_experts": 4},
        {"use_gloo_process_groups": False},
        {"recompute_granularity": "full"},
        {"seq1f1b_splits": 4},
        {"non_persistent_ckpt_type": "global"},
        {"skip_train": True},
    ],
    ids=str,
)
def test_what_is_served_is_let_through(values: dict[str, Any]) -> None:
    for strategy in RUNNING:
        assert refused(args(str(strategy), **values)) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"paro_group_size": 2}, "--paro-group-size 2: --paro is not given, so it has no effect"),
        ({"paro_links": [100.0, 10.0]}, "--paro-links 100.0 10.0: --paro is not given, so it has no effect"),
        ({"paro_collectives": "flat"}, "--paro-collectives flat: --paro is not given"),
        ({"paro": "NI"}, "'NI': give three letters"),
        ({"paro": "nig"}, "'nig': give three letters"),
        ({"paro": "NGI"}, "NGI: gradients are sharded globally.*give --paro NGG"),
        ({"paro": "GNN"}, "GNN: parameters are sharded globally.*give --paro GNG"),
        ({"paro": "INI"}, "--paro INI does not run: --paro III uses less memory"),
        ({"paro": "GNG"}, "--paro GNG does not run: --paro GGG uses less memory"),
        ({"paro": "GIG"}, "--paro GIG does not run: --paro IIG gathers parameters inside a group only"),
        ({"paro": "NIG", "paro_group_size": 0}, "--paro-group-size 0: give at least 1"),
        ({"paro": "NIG", "paro_links": [math.nan, 1.0]}, "nan, 1.0]: give positive, finite bandwidths"),
        ({"paro": "NIG", "paro_links": [1.0, math.inf]}, "1.0, inf]: give positive, finite bandwidths"),
        (
            {"paro": "NNG", "paro_group_size": 2, "paro_collectives": "flat"},
            "--paro-group-size 2: --paro NNG with --paro-collectives flat uses no groups",
        ),
        ({"paro": "NIG", "yaml_cfg": "run.yaml"}, "--paro with --yaml-cfg"),
        ({"paro_selective_overlap": True}, "--paro-selective-overlap: --paro is not given, so it has no effect"),
        ({"paro": "NIG", "paro_selective_overlap": True}, "--paro NIG does not shard parameters"),
        ({"paro": "IIG", "paro_prefetch_units": 2}, "units 2: --paro-selective-overlap is not given"),
        (
            {"paro": "IIG", "paro_selective_overlap": True, "paro_prefetch_units": 0},
            "--paro-prefetch-units 0: give at least 1",
        ),
    ],
    ids=str,
)
def test_what_means_nothing_or_does_not_run_is_refused_at_once(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sharding_numbers(parsed(**values))


def test_what_means_something_passes_at_once() -> None:
    check_sharding_numbers(parsed())
    check_sharding_numbers(Namespace())  # a script's own namespace, without our flags
    for strategy in RUNNING:
        check_sharding_numbers(parsed(paro=str(strategy)))
        check_sharding_numbers(parsed(paro=str(strategy), paro_group_size=2))
    check_sharding_numbers(parsed(paro="NIG", paro_group_size=2, paro_collectives="flat"))
    overlap = parsed(paro="IIG", paro_selective_overlap=True)
    check_sharding_numbers(overlap)
    assert [prefetch_units(given) for given in (parsed(paro="IIG"), overlap, Namespace())] == [0, 1, 0]
    assert prefetch_units(parsed(paro="IIG", paro_selective_overlap=True, paro_prefetch_units=3)) == 3
    assert [wants_sharding(given) for given in (parsed(), parsed(paro="NNN"), Namespace())] == [False, True, False]


def test_every_valid_triplet_runs_or_has_one_that_does_instead() -> None:
    assert {str(strategy) for strategy in VALID} == {str(strategy) for strategy in RUNNING} | set(INSTEAD)
    for why in INSTEAD.values():
        first = why.removeprefix("--paro ").split()[0]
        assert Strategy.parse(first) in RUNNING


@pytest.mark.parametrize(("paro", "size"), [("NNN", 4), ("NII", 8), ("IIG", 1)])
def test_what_is_set(paro: str, size: int) -> None:
    given = args(paro, paro_group_size=size)
    resolve(given, None)
    assert (given.paro_group_size, given.paro_groups, given.paro_collectives) == (size, 8 // size, "overlapped")
    assert given.use_distributed_optimizer and given.dist_ckpt_optim_fully_reshardable
    assert given.num_distributed_optimizer_instances == 1


def test_what_is_resolved_twice_stays() -> None:
    given = args("NII", bf16=True, grad_reduce_in_bf16=True)
    first = resolve(given, 4)
    refuse_unserved_sharding(given)
    kept = vars(given).copy()
    assert sharding_plan(given) == first == resolve(given, None)
    assert vars(given) == kept and given.paro_wire == "bf16"


@pytest.mark.parametrize(
    ("values", "wire", "sizes"),
    [
        ({}, "fp32", Widths(param=4, grad=4, optimizer=8, grad_wire=4)),
        ({"bf16": True}, "fp32", Widths(param=2, grad=4, optimizer=12, grad_wire=4)),
        ({"bf16": True, "grad_reduce_in_bf16": True}, "bf16", Widths(param=2, grad=4, optimizer=12, grad_wire=2)),
        ({"fp16": True}, "fp16", Widths(param=2, grad=2, optimizer=12, grad_wire=2)),
        (
            {"fp16": True, "accumulate_allreduce_grads_in_fp32": True},
            "fp32",
            Widths(param=2, grad=4, optimizer=12, grad_wire=4),
        ),
    ],
    ids=str,
)
def test_what_gradients_accumulate_and_are_sent_in(values: dict[str, Any], wire: str, sizes: Widths) -> None:
    given = args("NIG", paro_group_size=2, **values)
    found = resolve(given, None)
    given.data_parallel_size = 8
    check_unchanged(given, found)
    assert (given.paro_wire, widths(given), given.grad_reduce_in_bf16) == (wire, sizes, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data_parallel_size", 4),
        ("use_distributed_optimizer", False),
        ("num_distributed_optimizer_instances", 2),
        ("dist_ckpt_optim_fully_reshardable", False),
        ("grad_reduce_in_bf16", True),
    ],
)
def test_what_validation_changes_is_refused(name: str, value: Any) -> None:
    given = args("NII", paro_group_size=2)
    found = resolve(given, None)
    given.data_parallel_size = 8
    setattr(given, name, value)
    with pytest.raises(ValueError, match=f"--paro NII: upstream's validation set .*{name}"):
        check_unchanged(given, found)


@pytest.mark.parametrize(
    ("world", "node", "values", "size"),
    [
        (8, 8, {}, 8),
        (8, 4, {}, 4),
        (8, 1, {}, 1),
        (16, 8, {"tensor_model_parallel_size": 2}, 4),
        (16, 8, {"pipeline_model_parallel_size": 2}, 8),
        (16, 4, {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}, 4),
        (16, 8, {"pipeline_model_parallel_size": 2, "use_tp_pp_dp_mapping": True}, 4),
        (1, 8, {}, 1),
        (2, None, {"pipeline_model_parallel_size": 2}, 1),  # one rank has no group, wherever it is
    ],
)
def test_a_group_is_a_node_by_default(world: int, node: int | None, values: dict[str, Any], size: int) -> None:
    assert sharding_plan(args("NIG", world, **values), node).groups == RankGroups(
        data_parallel_ranks(args("NIG", world, **values)), size
    )


def test_without_groups_no_node_is_asked_for() -> None:
    assert sharding_plan(args("NNG", paro_collectives="flat")).groups == RankGroups(8, 8)
    with pytest.raises(ValueError, match=r"LOCAL_WORLD_SIZE is not set.*give --paro-group-size"):
        sharding_plan(args("NNG"))
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE is not set"):
        sharding_plan(args("NIG", paro_collectives="flat"))


@pytest.mark.parametrize(
    ("world", "node", "values", "message"),
    [
        (8, 3, {}, r"are distributed unevenly over nodes of 3 ranks.*one of \[1, 2, 4, 8\]"),
        (8, 5, {"pipeline_model_parallel_size": 2}, "are distributed unevenly over nodes of 5"),
        (
            4,
            3,
            {"tensor_model_parallel_size": 2},
            r"have \[1, 2\] ranks on nodes of 3 ranks, so a node cannot be a group",
        ),
        (6, 2, {"tensor_model_parallel_size": 4}, "6 ranks are not a multiple of 4 tensor-parallel x 1 pipeline"),
        (
            6,
            6,
            {"paro_group_size": 4},
            r"6 data-parallel ranks cannot be .*one of \[1, 2, 3, 6\]",
        ),
    ],
    ids=str,
)
def test_what_is_no_group_is_refused(world: int, node: int, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sharding_plan(args("NIG", world, **values), node)


@pytest.mark.parametrize("mapping", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2), (1, 3, 2)])
def test_data_parallel_groups_are_upstreams(sizes: tuple[int, int, int], mapping: bool) -> None:
    from megatron.core.parallel_state import RankGenerator

    tensor, pipeline, context = sizes
    given = args(
        "NIG",
        4 * tensor * pipeline * context,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        use_tp_pp_dp_mapping=mapping,
    )
    order = "tp-cp-ep-pp-dp" if mapping else "tp-cp-ep-dp-pp"
    upstreams = RankGenerator(tp=tensor, ep=1, dp=4, pp=pipeline, cp=context, order=order).get_ranks("dp-cp")
    assert sorted(members(given)) == sorted(upstreams)


def test_the_line_that_is_told() -> None:
    found = ShardingPlan(Strategy.parse("NIG"), RankGroups(16, 8), CollectivesMode.OVERLAPPED)
    assert summary(found, Widths()) == (
        "PaRO NIG: 16 data-parallel rank(s) in 2 group(s) of 8, overlapped collectives; bytes per parameter: held 2 + "
        "0.5 + 0.75, sent 1.75 inside + 0 between groups per micro-batch, 1.75 inside + 0.25 between groups per step"
    )
    flat = summary(ShardingPlan(Strategy.parse("NNG"), RankGroups(16, 16), CollectivesMode.FLAT), Widths())
    assert flat.endswith("0 inside + 0 between groups + 3.75 flat per step")
    for size, other in ((1, "NNG"), (16, "NGG")):
        assert f"PaRO NIG (here as {other}): " in summary(
            ShardingPlan(found.strategy, RankGroups(16, size), CollectivesMode.FLAT), Widths()
        )


ValidationResult = tuple[str | None, dict[str, Any], str]
SET = (
    "paro_group_size",
    "paro_groups",
    "paro_collectives",
    "paro_wire",
    "num_distributed_optimizer_instances",
    "accumulate_allreduce_grads_in_fp32",
)


def what_upstreams_validation_says(cases: list[list[str]], node: str | None) -> list[ValidationResult]:
    """Parse and validate each command line as rank 0 of four; return what is refused, set and printed."""
    import contextlib
    import io

    os.environ |= {"WORLD_SIZE": "4", "RANK": "0"}
    os.environ.pop("LOCAL_WORLD_SIZE")
    if node is not None:
        os.environ["LOCAL_WORLD_SIZE"] = node
    import patches

    patches.start()
    from megatron.training import arguments

    answers: list[ValidationResult] = []
    for case in cases:
        sys.argv = ["pretrain_gpt.py", *case]
        message, parsed_args, output = None, Namespace(), io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                parsed_args = arguments.parse_args()
                arguments.validate_args(parsed_args)
        except (ValueError, AssertionError) as error:
            message = str(error)
        line = "\n".join(line for line in output.getvalue().splitlines() if line.startswith("> PaRO"))
        answers.append((message, {name: getattr(parsed_args, name, None) for name in SET}, line))
        assert not torch.distributed.is_initialized()
    return answers


def answers(ranks: RankPool, *cases: str, node: str | None = "2") -> list[ValidationResult]:
    """Return the messages about the tiny model; all cases run under the same patches."""
    lines = [flags(TINY, case) for case in cases]
    result: list[ValidationResult] = ranks.run(1, what_upstreams_validation_says, lines, node)[0]
    return result


def test_upstreams_validation_refuses_what_sharding_cannot_serve(ranks: RankPool) -> None:
    cases: dict[str, str | None] = {f"--paro {strategy}": None for strategy in RUNNING}
    cases |= {
        "--paro NIG --overlap-grad-reduce --overlap-param-gather": None,
        "--paro IIN": "IIN: gradients are sharded inside a group",
        "--paro GIG": "--paro GIG does not run",
        "--paro NIG --paro-group-size 3": "4 data-parallel ranks cannot be divided into groups of 3",
        f"--paro NIG --paro-group-size 4 {TP2}": "2 data-parallel ranks cannot be divided into groups of 4",
        "--paro NNI --num-distributed-optimizer-instances 4": "--num-distributed-optimizer-instances with --paro NNI",
        "--paro GGG --use-megatron-fsdp": "--use-megatron-fsdp with --paro GGG: it has its own sharding",
        "--paro GGG --use-torch-fsdp2": "--use-torch-fsdp2 with --paro GGG: it has its own sharding",
        "--paro NNG --optimizer muon": "--optimizer with --paro NNG: PaRO uses upstream's",
        "--paro NNG --optimizer sgd": "--optimizer with --paro NNG: PaRO uses upstream's",
        "--paro NNG --freeze-all-layers": "--freeze-all-layers with --paro NNG",
        "--paro NNG --enable-cuda-graph": "--cuda-graph-impl with --paro NNG",
        "--paro NNG --grad-reduce-in-bf16": "--grad-reduce-in-bf16 with --paro NNG: it has no effect",
        "--paro NNG --ddp-reduce-scatter-with-fp32-accumulation": "--ddp-reduce-scatter-with-fp32-accumulation with",
        f"--paro NNG {TP2} --sequence-parallel --tensor-parallel-num-weight-shards 4": "--tensor-parallel-num-weight-",
        "--paro NNG --num-experts 4 --expert-model-parallel-size 2": "--expert-model-parallel-size with --paro NNG",
        f"--paro NNG {TP2} --num-experts 4 --expert-tensor-parallel-size 1": "--expert-tensor-parallel-size with",
        "--paro NNG --ckpt-format torch": "--ckpt-format with --paro NNG: only torch_dist",
        "--paro NNG --distrib-optim-fully-reshardable-mem-efficient": "--distrib-optim-fully-reshardable-mem-efficient",
        "--paro NNG --non-persistent-ckpt-type local": "--non-persistent-ckpt-type local with --paro NNG",
        "--paro GGG --log-params-norm": "--log-params-norm with --paro GGG",
        "--paro NGG --save-wgrads-interval 1": "--save-wgrads-interval with --paro NGG",
        "--paro-group-size 2": "--paro-group-size 2: --paro is not given",
    }
    for case, (message, _, _), want in zip(cases, answers(ranks, *cases), cases.values(), strict=True):
        assert (message is None) == (want is None), (case, message)
        assert want is None or (message is not None and want in message), (case, message)


def test_upstreams_validation_takes_what_paro_sets(ranks: RankPool) -> None:
    plain, bf16, wire, whole, tensor = answers(
        ranks,
        "--paro NII",
        "--paro NIG --bf16",
        "--paro NIG --bf16 --grad-reduce-in-bf16",
        "--paro NNN --paro-collectives flat",
        f"--paro III --paro-group-size 2 {TP2}",
    )
    names = dict.fromkeys(SET)
    assert plain[1] == names | dict(zip(SET, (2, 2, "overlapped", "fp32", 1, False), strict=True))
    assert bf16[1] == names | dict(zip(SET, (2, 2, "overlapped", "fp32", 1, True), strict=True))
    assert wire[1] == names | dict(zip(SET, (2, 2, "overlapped", "bf16", 1, True), strict=True))
    assert whole[1] == names | dict(zip(SET, (4, 1, "flat", "fp32", 1, False), strict=True))
    assert tensor[1] == names | dict(zip(SET, (2, 1, "overlapped", "fp32", 1, False), strict=True))
    assert wire[2] == (
        "> PaRO NIG: 4 data-parallel rank(s) in 2 group(s) of 2, overlapped collectives; bytes per parameter: held 2 + "
        "2 + 3, sent 1 inside + 0 between groups per micro-batch, 1 inside + 1 between groups per step"
    )
    assert tensor[2].startswith("> PaRO III (here as GGG): 2 data-parallel rank(s) in 1 group(s) of 2")


def test_an_unknown_node_is_refused(ranks: RankPool) -> None:
    unknown, given, single = answers(ranks, "--paro NIG", "--paro NIG --paro-group-size 2", "--paro NNG", node=None)
    assert unknown[0] is not None and "LOCAL_WORLD_SIZE is not set" in unknown[0]
    assert given[0] is None and given[1]["paro_groups"] == 2
    assert single[0] is not None


@pytest.mark.parametrize("text", ["two", "0", "-1", ""])
def test_a_node_of_no_ranks_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from patches.environment import node_ranks

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert node_ranks() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    with pytest.raises(ValueError, match=f"LOCAL_WORLD_SIZE={text}: not a number of ranks"):
        node_ranks()
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert node_ranks() is None


def test_zero_bubble_is_refused_by_its_own_name(ranks: RankPool) -> None:
    case = "--zero-bubble --transformer-impl local --pipeline-model-parallel-size 2"
    several, one = answers(ranks, f"--paro III --paro-group-size 1 {case}", f"--paro NNG --paro-group-size 1 {case}")
    assert several[0] is not None and "--zero-bubble with --paro III" in several[0] and one[0] is None
