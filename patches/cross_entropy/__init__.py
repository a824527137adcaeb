"""System `cross_entropy`: the output layer and the loss in chunks of tokens."""

from patches.hooks import FORWARD_BACKWARD, VALIDATE_ARGS
from patches.record import Callback, Record

_ASKED_FOR = "megatron.longseq.cross_entropy.arguments:wants_chunks"

RECORDS = (
    Record(
        id="cross_entropy.chunks",
        system="cross_entropy",
        action="wrap",
        target="megatron.core.models.gpt.gpt_model:GPTModel._postprocess",
        impl="patches.cross_entropy.runtime:with_chunked_loss",
        reads=(
            "megatron.core.models.gpt.gpt_model:GPTModel.forward",
            "megatron.core.models.common.language_module.language_module:LanguageModule.compute_language_model_loss",
            "megatron.core.models.common.language_module.language_module:LanguageModule._scale_logits",
            "megatron.core.tensor_parallel.layers:ColumnParallelLinear.forward",
            "megatron.core.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication",
            "megatron.core.tensor_parallel.cross_entropy:VocabParallelCrossEntropy",
        ),
        why="Upstream computes the logits of all tokens of a micro-batch, and a float32 copy of them, before their "
        "loss; its output_processor, which could do otherwise, is an argument that scripts do not give.",
        when=_ASKED_FOR,
        test="tests/distributed/test_chunked_loss.py::test_flag_bounds_the_logits",
        remove_when="upstream ships a linear cross entropy that supports sequence parallelism and tied embeddings",
    ),
)

CALLBACKS = (
    Callback(
        id="cross_entropy.arguments",
        hook=VALIDATE_ARGS,
        impl="patches.cross_entropy.runtime:with_refusals",
        why="What chunks do not support has to be refused once upstream has resolved its flags and before any process "
        "group exists.",
        when=_ASKED_FOR,
        test="tests/unit/test_chunked_loss_flags.py::test_upstreams_validation_refuses_unsupported_flags",
        remove_when="upstream calls a hook after validating its arguments",
    ),
    Callback(
        id="cross_entropy.model",
        hook=FORWARD_BACKWARD,
        impl="patches.cross_entropy.runtime:with_checked_model",
        why="A script may make another model, or one with a loss of its own, for which the flag would do nothing.",
        when=_ASKED_FOR,
        test="tests/unit/test_chunked_loss_flags.py::test_other_models_are_refused_before_their_first_step",
        remove_when="upstream's models say which output processors they take",
    ),
)
