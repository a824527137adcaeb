"""Command line of data preparation: `prepare`, `stdlib`, `flags`, `inspect`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.longseq.data import DataError, corpus, manifest, splits
from megatron.longseq.data.encode import Options
from megatron.longseq.data.pool import available_cores
from megatron.longseq.data.prepare import Request, prepare
from megatron.longseq.data.tokenizer import TokenizerSpec, byte_spec, file_spec, load
from megatron.longseq.data.write import indexed_dataset

STDLIB_SEED = 1234


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0 done, 1 refused, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; finished shards are kept, the same command goes on from them", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron.longseq.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    make = commands.add_parser("prepare", help="text or jsonl, files or folders, to upstream's .bin/.idx")
    make.add_argument("inputs", nargs="+", metavar="INPUT", help="files, or folders that are searched recursively")
    make.add_argument("--glob", action="append", default=[], help="in folders, take only these files (repeatable)")
    make.add_argument("--format", choices=("auto", "text", "jsonl"), default="auto", help="auto: by suffix")
    make.add_argument("--json-key", default="text", help="the key of a jsonl line that holds the document")
    make.add_argument("--shuffle-seed", type=int, help="shuffle the documents with this seed (default: keep the order)")
    make.add_argument("--skip-malformed", action="store_true", help="count and list malformed documents, go on")
    make.set_defaults(run=_prepare)
    stdlib = commands.add_parser("stdlib", help="the sources of this interpreter's standard library, shuffled")
    stdlib.add_argument("--shuffle-seed", type=int, default=STDLIB_SEED)
    # A source file in another encoding is Python's business, not the user's.
    stdlib.set_defaults(run=_prepare, inputs=None, json_key="text", skip_malformed=True)
    for command in (make, stdlib):
        _add_output_arguments(command)
    flags = commands.add_parser("flags", help="print upstream's flags that train on an output")
    flags.set_defaults(run=_flags)
    inspect = commands.add_parser("inspect", help="print an output's statistics, and one document as text")
    inspect.add_argument(
        "--document", type=int, metavar="I", help="decode this document (from 0, negative from the end)"
    )
    inspect.add_argument("--tokenizer-model", help="the tokenizer file, where it no longer lies where it was")
    inspect.set_defaults(run=_inspect)
    for command in (flags, inspect):
        command.add_argument("prefix", metavar="PREFIX")
    return parser


def _add_output_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.json")
    command.add_argument("--tokenizer-model", metavar="FILE", help="a Hugging Face tokenizer.json (default: bytes)")
    command.add_argument("--eod-token", help="the token that ends a document (default: eos_token of its config)")
    command.add_argument("--no-special-tokens", action="store_true", help="no BOS etc. from the tokenizer file")
    command.add_argument("--append-eod", action=argparse.BooleanOptionalAction, default=True)
    command.add_argument("--workers", type=_positive(int), default=available_cores(), help="processes (default: cores)")
    command.add_argument("--shard-mb", type=_positive(float), help="unit of work and resumption (default: by input)")
    command.add_argument("--overwrite", action="store_true", help="rebuild an output that was made from something else")


def _positive(kind: type[int] | type[float]) -> Any:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value

    return parse


def _prepare(args: argparse.Namespace) -> None:
    files = (
        corpus.stdlib_files()
        if args.inputs is None
        else corpus.find_files(args.inputs, args.glob, None if args.format == "auto" else args.format)
    )
    request = Request(
        files=files,
        prefix=args.output,
        tokenizer=_tokenizer(args),
        options=Options(args.json_key, args.append_eod, args.skip_malformed, args.shuffle_seed),
        workers=args.workers,
        overwrite=args.overwrite,
        shard_bytes=None if args.shard_mb is None else max(int(args.shard_mb * 1e6), 1),
    )
    # Beside PREFIX.bin upstream keeps its own folder, PREFIX/cache: that one may be there.
    folder = Path(request.prefix)
    if request.prefix.endswith("/") or not folder.name or (folder.is_dir() and not (folder / "cache").is_dir()):
        raise DataError(f"--output {args.output}: a prefix for three files is wanted, such as {args.output}/corpus")
    try:
        made = prepare(request)
    except OSError as error:
        raise DataError(f"{error.filename or args.output}: {error.strerror or error}") from error
    if made:
        _statistics(args.output)
        _warn_of_few(manifest.read(args.output)["documents"])
        _flags(argparse.Namespace(prefix=args.output))


def _warn_of_few(documents: int) -> None:
    bare = splits.without_documents(splits.DEFAULT, documents)
    if not bare:
        return
    without = {1: "; there is nothing to validate on", 2: "; there is no test"}.get(documents, "")
    print(
        f"warning: of {documents} document(s) upstream's default --split {splits.DEFAULT} gives {' and '.join(bare)} "
        f"none, and a run with it is refused. The flags below give another one{without}. A text file is one document: "
        "prepare .jsonl, one document a line, for more of them."
    )


def _tokenizer(args: argparse.Namespace) -> TokenizerSpec:
    if args.tokenizer_model:
        return file_spec(args.tokenizer_model, args.eod_token, not args.no_special_tokens)
    if args.eod_token or args.no_special_tokens:
        raise DataError("--eod-token and --no-special-tokens speak of a tokenizer file: give --tokenizer-model too")
    return byte_spec()


def _flags(args: argparse.Namespace) -> None:
    content = manifest.read(args.prefix)
    print(shlex.join(manifest.training_flags(args.prefix, content["tokenizer"], content["documents"])))


def _statistics(prefix: str) -> None:
    content = manifest.read(prefix)
    lengths, tokenizer = content["lengths"], content["tokenizer"]
    print(f"{prefix}: {content['documents']:,} documents, {content['tokens']:,} tokens ({content['dtype']})")
    print("tokens per document: " + "  ".join(f"{name} {value:,}" for name, value in lengths.items()))
    print(f"left out: {content['empty_documents']:,} empty, {content['malformed']['count']:,} malformed")
    name = tokenizer["model"] or "bytes"
    print(f"tokenizer: {name}, vocabulary {tokenizer['vocab_size']:,}, end of document {tokenizer['eod_id']}")


def _inspect(args: argparse.Namespace) -> None:
    content = manifest.read(args.prefix)
    _statistics(args.prefix)
    if args.document is None:
        return
    count = content["documents"]
    if not -count <= args.document < count:
        raise DataError(f"--document {args.document}: {args.prefix} holds documents 0 to {count - 1}")
    fields = dict(content["tokenizer"])
    fields["model"] = args.tokenizer_model or fields["model"]
    tokenizer = load(TokenizerSpec(**fields))
    number = args.document % count
    # The ids are a view into the data set's map: upstream unmaps it when the data set goes.
    dataset = indexed_dataset().IndexedDataset(args.prefix)
    ids = dataset[number].tolist()
    print(f"document {number}: {len(ids):,} tokens")
    text = tokenizer.decode(ids)
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", errors="replace"))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
