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
gc.disable()  # nothing of what is imported here is garbage

import megatron.core.datasets.blended_megatron_dataset_builder  # noqa: E402
import megatron.core.datasets.helpers  # noqa: E402
import megatron.core.models.mimo  # noqa: E402
import megatron.core.tokenizers.text  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from megatron.core.datasets import gpt_dataset  # noqa: E402
from megatron.training import argument_utils, arguments, training  # noqa: E402, F401

from megatron import longseq  # noqa: E402
from patches import ledger  # noqa: E402
from patches.engine import alias_scan  # noqa: E402
from patches.engine.place import resolve, underlying  # noqa: E402
from patches.upstream import source  # noqa: E402

with contextlib.suppress(ImportError):  # a machine that is only there to measure may lack it
    import torch.utils.tensorboard

read_symbol, symbols = source.Upstream.symbol, {}


def known_symbol(upstream: source.Upstream, place: str) -> source.Symbol:
    """Return a symbol; those of the installed wheel are read once."""
    if not isinstance(upstream.finder, source.ImportPath):
        return read_symbol(upstream, place)
    if place not in symbols:
        symbols[place] = read_symbol(upstream, place)
    return symbols[place]


# Every rank verifies the same upstream.
source.Upstream.symbol = known_symbol
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


def refuse_undeclared_references() -> None:
    """Raise if a loaded module refers to a replaced object at a place that no record declares."""
    records = [record for record in ledger.RECORDS if record.action != "context"]
    declared = {resolve(place).key for record in records for place in (record.target, *record.aliases)}
    raw = [resolve(record.target).raw() for record in records]
    hits = alias_scan.scan([alias_scan.Original(*of, underlying(of[1])) for of in zip(records, raw, strict=True)])
    hidden = [hit.name for hit in hits if resolve(hit.name).key not in declared]
    if hidden:
        raise RuntimeError(f"these refer to what patches replace: {', '.join(hidden)}")


# Every rank looks in all modules for further references to what it patches. Those that are loaded here are scanned
# once; a rank scans the modules that it imports itself.
refuse_undeclared_references()
loaded_modules, settled = alias_scan._modules, frozenset(sys.modules)
alias_scan._modules = lambda: loaded_modules(settled)

# Upstream's mock data are 100,000 documents, whose millions of samples every rank shuffles at its start.
gpt_dataset.MockGPTLowLevelDataset.size = 1_000

torch.set_num_threads(1)
gc.collect()
gc.enable()
gc.freeze()  # what is here already stays: ranks neither look through it again nor copy its pages
