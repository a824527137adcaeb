"""Predicates that several systems share; the others are in the folders of their systems.

A predicate takes the parsed arguments (None for records of stage `start`) and says whether the patch is wanted.
"""

from argparse import Namespace


def always(args: Namespace | None) -> bool:
    """Return True: the patch applies to every run."""
    return True


def no_cuda(args: Namespace | None) -> bool:
    """Return whether there is no CUDA device."""
    import torch

    return not torch.cuda.is_available()


def has_local_layers(args: Namespace) -> bool:
    """Return whether the layers are upstream's local ones: by --transformer-impl, and always without CUDA."""
    return args.transformer_impl == "local" or no_cuda(args)
