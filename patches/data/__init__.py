"""System `data`: check the data files of a run, and end its data workers."""

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
        why="Upstream names cached sample indices by the path of the data, so it would use them for other data at "
        "the same path. With --exit-signal-handler its data workers ignore SIGTERM, which Python sends when "
        "their rank exits. If their iterator is still referenced (by a traceback, for example), the rank waits "
        "forever.",
        when="patches.conditions:always",
        test="tests/distributed/test_data_workers.py::test_kept_iterators_do_not_keep_their_workers",
        remove_when="names of cached indices depend on the data's content, and data workers end with their rank",
        stage="start",
    ),
    Record(
        id="data.epochs",
        system="data",
        action="wrap",
        target="megatron.core.datasets.gpt_dataset:GPTDataset._get_num_epochs",
        impl="patches.data.arguments:without_endless_loop",
        why="Upstream counts epochs until they have enough tokens. The loop never ends if an epoch has no tokens.",
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
        why="Upstream does not check that --split gives every part a document, or that the files of a data set "
        "belong together. It fails later, when some ranks build samples while the others wait.",
        when="patches.data.arguments:reads_data",
        test="tests/unit/test_data_usable.py::test_upstreams_validation_refuses_a_split_without_documents",
        remove_when="upstream checks its data sets when it validates its arguments",
    ),
)
