"""Refusals that depend on which layers each pipeline stage has."""

from argparse import Namespace

from megatron.longseq.pipeline.plan.from_args import stage_layers


def refuse_stages(args: Namespace) -> None:
    """Refuse stages that our schedules cannot run, from upstream's validated arguments.

    Raises:
        ValueError: names the stage, the flag and what to do.
    """
    predicts, layers = _predicts(args), _layers(args)
    if any(predicts[:-1]):
        raise ValueError(
            f"--pipeline-model-parallel-layout {args.pipeline_model_parallel_layout}: our pipeline schedules do not "
            f"serve multi-token prediction in stage {predicts.index(True)}: upstream's messages then differ in size "
            "from stage to stage. Put it into the last stage."
        )
    empty = [stage for stage, count in enumerate(layers[:-1]) if count < 1]
    if args.zero_bubble and empty:
        raise ValueError(
            f"--zero-bubble: pipeline stage {empty[0]} of {len(layers)} has no transformer layer, so no weight "
            f"gradient to compute apart (layers per stage: {layers}). Give each stage but the last a layer, by "
            "--num-layers, --decoder-first-pipeline-num-layers, --pipeline-model-parallel-layout or --account-for-..."
        )


def _layers(args: Namespace) -> list[int]:
    """Return the transformer layers of each pipeline rank; with virtual stages, of all of them."""
    layout = _layout(args)
    if layout is None:
        return stage_layers(args)
    return [sum(stage.count("decoder") for stage in rank) for rank in layout]


def _predicts(args: Namespace) -> list[bool]:
    """Return per pipeline rank whether it predicts further tokens."""
    return [any("mtp" in stage for stage in rank) for rank in _layout(args) or []]


def _layout(args: Namespace) -> list[list[list[str]]] | None:
    """Return per pipeline rank and virtual stage the names of its layers; None: upstream deals them."""
    given = args.pipeline_model_parallel_layout
    if given is None:
        return None
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    made = PipelineParallelLayerLayout(given, args.pipeline_model_parallel_size)
    return [[[layer.name for layer in stage] for stage in rank] for rank in made.layout]
