"""Price a run with `--flexsp` that is given by flags, for the documents of `--lengths`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.longseq.attention.plan.heads import Heads
from megatron.longseq.flexsp.arguments import parse_degrees, parse_kinds
from megatron.longseq.flexsp.plan.cost import FAMILIES
from megatron.longseq.flexsp.plan.cost_file import load_cost
from megatron.longseq.flexsp.plan.plan import PLANNERS
from megatron.longseq.planner.plan.cluster import Cluster
from megatron.longseq.planner.plan.configuration import reasons
from megatron.longseq.planner.plan.flags import read_fully
from megatron.longseq.planner.plan.flexsp_step import DocumentPrediction, document_run, predict_flexsp
from megatron.longseq.planner.plan.task import parse_count
from megatron.longseq.planner.tools.document_lengths import steps_of

LENGTHS = "lengths"  # names the documents; it is no flag of training
_BATCH = "flexsp_batch_tokens"
_STEPS = 2
_OWN = (
    *(LENGTHS, "flexsp", "flexsp_max_tokens_per_rank", "flexsp_degrees", "flexsp_kinds", "flexsp_planner"),
    *("flexsp_cost", _BATCH),
)


def _clean(name: str) -> str:
    return name.strip().lstrip("-").replace("-", "_")


def wants_documents(values: Mapping[str, Any]) -> bool:
    """Return whether a run is one with --flexsp.

    Raises:
        ValueError: lengths are given without it.
    """
    names = {_clean(name): value for name, value in values.items()}
    wanted = str(names.get("flexsp", "")).strip().lower() in ("true", "1", "yes", "on")
    if not wanted and names.get(LENGTHS):
        raise ValueError("lengths are given, but not flexsp; other runs train on full sequences")
    return wanted


def predict_documents(values: Mapping[str, Any]) -> tuple[DocumentPrediction, Cluster]:
    """Return the prediction of a run with --flexsp, and its cluster.

    Args:
        values: flags in snake case, with `lengths` and `flexsp_max_tokens_per_rank`.

    Raises:
        ValueError: a flag is missing, wrong or refused with --flexsp, or a document fits into no group.
    """
    own = {_clean(name): str(value).strip() for name, value in values.items() if _clean(name) in _OWN}
    rest = {name: value for name, value in values.items() if _clean(name) not in _OWN}
    for name, example in ((LENGTHS, "a file with one length a line"), ("flexsp_max_tokens_per_rank", "8192")):
        if not own.get(name):
            raise ValueError(f"flexsp: its steps depend on the lengths of documents; give {name}, such as {example}")
    model, machine, run, _, contradicting = read_fully(rest)
    refused = (
        ("context_parallel_size above 1", run.context_parallel_size > 1),
        ("micro_batch_size above 1", run.micro_batch_size > 1),
        ("seq1f1b_splits or zero_bubble", run.seq1f1b_splits > 1 or run.zero_bubble),
        ("num_experts", model.num_experts > 0),
        ("multi_latent_attention", model.multi_latent_attention),
        ("attention_dropout above 0", model.attention_dropout > 0),
    )
    wrong = [text for text, is_wrong in refused if is_wrong]
    if wrong:
        raise ValueError(f"flexsp with {', '.join(wrong)}: training refuses it; see docs/flexsp.md")
    tokens = parse_count(own["flexsp_max_tokens_per_rank"], "flexsp_max_tokens_per_rank")
    planner = next((one for one in PLANNERS if one == own.get("flexsp_planner", "heuristic")), None)
    if planner is None:
        raise ValueError(f"flexsp_planner {own['flexsp_planner']!r}: give one of {', '.join(PLANNERS)}")
    batch = parse_count(own[_BATCH], _BATCH) if own.get(_BATCH) else None
    steps = steps_of(own[LENGTHS], run.seq_length, None if batch else run.global_batch_size, batch, _STEPS)
    one = document_run(model, machine, run, steps, tokens)
    assert one is not None  # the tokens are given
    if own.get("flexsp_cost"):
        heads = Heads.of(model.num_attention_heads, model.groups, run.tensor_model_parallel_size)
        one = replace(one, cost=replace(load_cost(own["flexsp_cost"]), tokens_per_rank=tokens, heads=heads))
    if not one.holds(run.seq_length):
        raise ValueError(
            f"flexsp_max_tokens_per_rank {tokens}: {run.data_parallel_size} data-parallel ranks hold no document of "
            f"seq_length {run.seq_length} tokens; give more tokens, or a smaller seq_length"
        )
    degrees = parse_degrees(own.get("flexsp_degrees") or "auto")
    kinds = parse_kinds(own.get("flexsp_kinds") or ",".join(FAMILIES))
    found = predict_flexsp(model, machine, one, steps, degrees, kinds, planner)
    why = tuple(dict.fromkeys([*contradicting, *reasons(model, run)]))
    return found._replace(prediction=replace(found.prediction, reasons=why)), machine


def describe_plans(found: DocumentPrediction) -> str:
    """Return a line about the plans of the steps."""
    groups = " ".join(
        f"<{' '.join(f'{counts.count(degree)}*{degree}' for degree in sorted(set(counts), reverse=True))}>"
        for counts in found.plans[0].degrees()
    )
    return (
        f"flexsp: {found.microbatches:g} micro-batches a step; of the first step, number * degree of the groups of "
        f"each: {groups}"
    )
