"""Imported once by the fork server: every rank is then forked from a process that has paid for all of this."""

import argparse
import contextlib
import functools
import gc
import importlib
import warnings

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from megatron.training import argument_utils, arguments, training  # noqa: E402, F401

from patches import ledger  # noqa: E402
from patches.upstream import source  # noqa: E402

with contextlib.suppress(ImportError):  # a machine that is only there to measure may lack it
    import torch.utils.tensorboard

# Every rank verifies the same upstream: parsed once, by its bytes.
source.syntax_tree = functools.cache(source.syntax_tree)
upstream = source.Upstream()
for record in ledger.RECORDS:
    for part in record.parts:
        importlib.import_module(part.impl.partition(":")[0])
    for place in record.upstream_places:
        upstream.symbol(place)

# Every rank builds upstream's parser, whose help texts come from parsing the sources of upstream's classes: done once.
factory = argument_utils.ArgumentGroupFactory
read_docstrings, reader = factory._get_field_docstrings, object.__new__(factory)
docstrings = functools.cache(lambda kind: read_docstrings(reader, kind))
factory._get_field_docstrings = lambda _, kind: docstrings(kind)
arguments.add_megatron_arguments(argparse.ArgumentParser())

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # what is here already stays: ranks neither look through it again nor copy its pages
