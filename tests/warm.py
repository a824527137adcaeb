"""Imported once by the fork server: every rank is then forked from a process that has paid for all of this."""

import argparse
import contextlib
import functools
import gc
import importlib
import pkgutil
import sys
import warnings

warnings.filterwarnings("ignore")

import megatron.core.datasets.blended_megatron_dataset_builder  # noqa: E402
import megatron.core.datasets.helpers  # noqa: E402
import megatron.core.models.mimo  # noqa: E402
import megatron.core.tokenizers.text  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from megatron.training import argument_utils, arguments, training  # noqa: E402, F401

from megatron import longseq  # noqa: E402
from patches import ledger  # noqa: E402
from patches.engine import alias_scan  # noqa: E402
from patches.engine.place import resolve, underlying  # noqa: E402
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

for module in pkgutil.walk_packages(longseq.__path__, "megatron.longseq."):
    if ".tools" not in module.name and not module.name.endswith("__main__"):
        importlib.import_module(module.name)

loaded_modules = alias_scan._modules


def modules_to_scan() -> frozenset[str]:
    """Return the names of the loaded modules that refer to an object that some patch replaces."""
    replaced = [(record, resolve(record.target).raw()) for record in ledger.RECORDS if record.action != "context"]
    hits = alias_scan.scan([alias_scan.Original(record, raw, underlying(raw)) for record, raw in replaced])
    return frozenset(hit.module for hit in hits)


# Every rank looks in all modules for further references to what it patches. The modules that are loaded here are
# scanned once: a rank scans those of them that refer to a replaced object, and those that it imports itself.
to_scan = modules_to_scan()
settled = frozenset(name for name, module in sys.modules.items() if getattr(module, "__name__", name) not in to_scan)
alias_scan._modules = lambda: loaded_modules(settled)

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # what is here already stays: ranks neither look through it again nor copy its pages
