"""System `data`: the processes that read samples, and the files that they read from."""

from patches.hooks import VALIDATE_ARGS
from patches.record import Callback, Record

RECORDS = (
    Record(
        id="data.loader",
        system="data",
        action="wrap",
        target="megatron.training.datasets.data_samplers:build_pretraining_data_loader",
        aliases=("megatron.training.training:build_pretraining_data_loader",),
        impl="patches.data.loader:checked_loader",
        reads=("megatron.core.datasets.gpt_dataset:GPTDataset._build_document_sample_shuffle_indices",),
        why="Upstream names cached sample indices by the path of the data and not by its content, and reads other data "
        "of that path through them. With --exit-signal-handler its data workers ignore SIGTERM, by which Python ends "
        "them when their rank exits; if something still holds their iterator (the traceback of an exception does), "
        "the rank waits for them forever.",
        when="patches.conditions:always",
        test="tests/distributed/test_data_workers.py::test_kept_iterators_do_not_keep_their_workers",
        remove_when="the names of cached indices depend on the data's content, and data workers end with their rank",
        stage="start",
    ),
    Record(
        id="data.epochs",
        system="data",
        action="wrap",
        target="megatron.core.datasets.gpt_dataset:GPTDataset._get_num_epochs",
        impl="patches.data.arguments:without_endless_loop",
        why="Upstream adds up the tokens of an epoch until they suffice, without end where an epoch has none.",
        when="patches.conditions:always",
        test="tests/unit/test_data_usable.py::test_the_loop_over_epochs_ends",
        remove_when="upstream refuses a split without tokens",
        stage="start",
    ),
)

CALLBACKS = (
    Callback(
        id="data.arguments",
        hook=VALIDATE_ARGS,
        impl="patches.data.arguments:with_usable_data",
        reads=(
            "megatron.core.datasets.blended_megatron_dataset_config:convert_split_vector_to_split_matrix",
            "megatron.core.datasets.blended_megatron_dataset_builder:BlendedMegatronDatasetBuilder._build_megatron_dataset_splits",
        ),
        why="Upstream does not look whether --split gives every part a document, nor whether the files of a data set "
        "belong together, before it builds samples on some of the ranks while the others wait.",
        when="patches.data.arguments:reads_data",
        test="tests/unit/test_data_usable.py::test_upstreams_validation_refuses_a_split_without_documents",
        remove_when="upstream checks its data sets when it validates its arguments",
    ),
)
