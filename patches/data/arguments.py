"""Refuse data that cannot give a run its samples, when flags are validated and where upstream would loop forever."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

DATA_FLAGS = (
    "data_path",
    "data_args_path",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "per_split_data_args_path",
)


def reads_data(args: Namespace) -> bool:
    """Return whether the flags name indexed data to check. With --dataloader-fast-cache-load the cache was checked.

    Flags from a YAML file of upstream may leave out any of them.
    """
    if getattr(args, "mock_data", False) or getattr(args, "dataloader_fast_cache_load", False):
        return False
    return any(getattr(args, name, None) is not None for name in DATA_FLAGS)


def with_usable_data(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `validate_args`: then look at the data that the flags name.

    Raises:
        ValueError: see `megatron.longseq.data.validate`.
    """

    def validate_args(args: Namespace, defaults: dict[str, Any] | None = None) -> Any:
        result = original(args, defaults or {})
        from megatron.longseq.data.validate import check_datasets

        check_datasets(
            *_blends(args),
            split=args.split,
            sequence=args.seq_length,
            full_validation=args.full_validation,
            separate_validation=args.multiple_validation_sets,
        )
        return result

    return validate_args


def _blends(args: Namespace) -> tuple[Any, Any]:
    """Return the data that the flags name, as upstream reads them.

    Raises:
        ValueError: a file that should name data is missing or holds something else; says which, and what it should.
    """
    from megatron.training.utils import get_blend_and_blend_per_split

    flags = {
        "data_args_path": "prefixes of data, separated by white space, optionally with a weight before each",
        "per_split_data_args_path": "a JSON object with the keys train, valid and test, each with a list of prefixes "
        "of data, optionally with a weight before each, or null",
    }
    try:
        return get_blend_and_blend_per_split(args)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        for name, content in flags.items():
            file = getattr(args, name)
            if file is not None:
                what = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                raise ValueError(
                    f"--{name.replace('_', '-')} {file}: {what}. The file must contain {content}."
                ) from error
        raise


def without_endless_loop(original: Callable[..., int]) -> Callable[..., int]:
    """Wrap `GPTDataset._get_num_epochs`, which adds up the tokens of an epoch until they suffice.

    Raises:
        ValueError: an epoch has no tokens; names the data and the split.
    """

    def _get_num_epochs(self: Any, num_tokens_per_epoch: int) -> int:
        if num_tokens_per_epoch <= 0 and self.num_samples is not None:
            raise ValueError(
                f"the {self.index_split.name} split gets no tokens of {self.dataset_path} ({len(self.indices)} "
                f"documents), but {self.num_samples} samples are requested; upstream would count epochs forever. "
                "Give another --split, or data for each split (--train-data-path, --valid-data-path, "
                "--test-data-path)."
            )
        return original(self, num_tokens_per_epoch)

    return _get_num_epochs
