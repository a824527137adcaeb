"""Convert text or jsonl files into upstream's indexed data sets, and inspect them."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from megatron.longseq.command_line import run_command
from megatron.longseq.data import DataError, chat, corpus, manifest, splits
from megatron.longseq.data.conversations import Conversations
from megatron.longseq.data.encode import EncodeOptions, available_cores
from megatron.longseq.data.prepare import PrepareRequest, prepare
from megatron.longseq.data.tokenizer import TokenizerSpec, byte_spec, file_spec, load
from megatron.longseq.data.write import indexed_dataset

STDLIB_SEED = 1234


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0 for success, 1 for a refused input, 130 after an interrupt.
    """
    try:
        return run_command(_parser(), argv)
    except KeyboardInterrupt:
        print("interrupted; finished shards are kept, and the same command resumes from them", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron.longseq.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    make = commands.add_parser("prepare", help="convert text or jsonl files to upstream's .bin and .idx")
    make.add_argument("inputs", nargs="+", metavar="INPUT", help="files, or folders that are searched recursively")
    make.add_argument(
        "--glob",
        action="append",
        default=[],
        help="in folders, take only files that match this pattern; may be repeated",
    )
    make.add_argument(
        "--format",
        choices=("auto", *get_args(corpus.FileFormat)),
        default="auto",
        help="auto: text or jsonl, chosen by suffix; conversations: jsonl of messages",
    )
    make.add_argument(
        "--json-key", help="key of the document or of the messages in a jsonl line (default: text or messages)"
    )
    make.add_argument(
        "--sft-tokenizer-prompt-format",
        choices=chat.PROMPT_FORMATS,
        help=f"upstream's flag, for conversations (default: {chat.PROMPT_FORMATS[0]}; default: the tokenizer's own)",
    )
    make.add_argument("--shuffle-seed", type=int, help="shuffle the documents with this seed (default: keep the order)")
    make.add_argument(
        "--skip-malformed", action="store_true", help="leave malformed documents out, and count and list them"
    )
    make.set_defaults(run=_prepare)
    stdlib = commands.add_parser("stdlib", help="convert the sources of this interpreter's standard library, shuffled")
    stdlib.add_argument("--shuffle-seed", type=int, default=STDLIB_SEED)
    # The user cannot repair source files in another encoding, so they are skipped.
    stdlib.set_defaults(run=_prepare, inputs=None, format="text", json_key=None, skip_malformed=True)
    for command in (make, stdlib):
        _add_output_arguments(command)
    flags = commands.add_parser("flags", help="print upstream's flags that train on an output")
    flags.set_defaults(run=_flags)
    inspect = commands.add_parser("inspect", help="print the statistics of an output, or one document as text")
    inspect.add_argument(
        "--document", type=int, metavar="I", help="print this document; counted from 0, negative numbers from the end"
    )
    inspect.add_argument("--tokenizer-model", help="path of the tokenizer file, if it was moved")
    inspect.set_defaults(run=_inspect)
    for command in (flags, inspect):
        command.add_argument("prefix", metavar="PREFIX")
    return parser


def _add_output_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--output", required=True, metavar="PREFIX", help="write PREFIX.bin, PREFIX.idx and PREFIX.json"
    )
    command.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="a Hugging Face tokenizer.json (default: bytes); for conversations the folder of a tokenizer",
    )
    command.add_argument("--eod-token", help="token that ends a document (default: eos_token of its config)")
    command.add_argument("--no-special-tokens", action="store_true", help="do not add BOS and other tokens of the file")
    command.add_argument("--append-eod", action=argparse.BooleanOptionalAction, default=True)
    command.add_argument("--workers", type=_positive(int), default=available_cores(), help="processes (default: cores)")
    command.add_argument("--shard-mb", type=_positive(float), help="size of a shard in MB (default: by input)")
    command.add_argument("--overwrite", action="store_true", help="rebuild an output made from something else")


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
    request = PrepareRequest(
        files=files,
        prefix=args.output,
        tokenizer=_tokenizer(args),
        options=EncodeOptions(
            args.json_key or ("messages" if args.format == "conversations" else "text"),
            args.append_eod,
            args.skip_malformed,
            args.shuffle_seed,
        ),
        workers=args.workers,
        overwrite=args.overwrite,
        shard_bytes=None if args.shard_mb is None else max(int(args.shard_mb * 1e6), 1),
    )
    # Upstream keeps its cache in PREFIX/cache, so a folder PREFIX with a cache may exist.
    folder = Path(request.prefix)
    if request.prefix.endswith("/") or not folder.name or (folder.is_dir() and not (folder / "cache").is_dir()):
        raise DataError(f"--output {args.output}: give the prefix of three files, such as {args.output}/corpus")
    try:
        made = prepare(request)
    except OSError as error:
        raise DataError(f"{error.filename or args.output}: {error.strerror or error}") from error
    if made:
        _statistics(args.output)
        _warn_about_empty_parts(manifest.read(args.output)["documents"])
        _flags(argparse.Namespace(prefix=args.output))


def _warn_about_empty_parts(documents: int) -> None:
    empty = splits.empty_parts(splits.DEFAULT, documents)
    if not empty:
        return
    without = {1: ", without validation", 2: ", without test data"}.get(documents, "")
    print(
        f"warning: upstream's default --split {splits.DEFAULT} assigns none of the {documents} document(s) to "
        f"{' and '.join(empty)}, and a run with it is refused. The flags below contain another --split{without}. "
        "A text file is one document; a .jsonl file with one document per line gives more of them."
    )


def _tokenizer(args: argparse.Namespace) -> TokenizerSpec:
    if args.format == "conversations":
        return _chat_tokenizer(args)
    if getattr(args, "sft_tokenizer_prompt_format", None):
        raise DataError("--sft-tokenizer-prompt-format belongs to conversations: give --format conversations too")
    if args.tokenizer_model:
        return file_spec(args.tokenizer_model, args.eod_token, not args.no_special_tokens)
    if args.eod_token or args.no_special_tokens:
        raise DataError("--eod-token and --no-special-tokens require a tokenizer file: give --tokenizer-model too")
    return byte_spec()


def _chat_tokenizer(args: argparse.Namespace) -> TokenizerSpec:
    if args.eod_token or args.no_special_tokens or not args.append_eod:
        raise DataError(
            "--format conversations: the chat template determines all tokens; leave out --eod-token, "
            "--no-special-tokens and --no-append-eod"
        )
    if not args.tokenizer_model:
        raise DataError("--format conversations requires the folder of a Hugging Face tokenizer: --tokenizer-model")
    return chat.chat_spec(args.tokenizer_model, args.sft_tokenizer_prompt_format or chat.PROMPT_FORMATS[0])


def _flags(args: argparse.Namespace) -> None:
    content = manifest.read(args.prefix)
    print(shlex.join(manifest.training_flags(args.prefix, content["tokenizer"], content["documents"])))


def _statistics(prefix: str) -> None:
    content = manifest.read(prefix)
    lengths, tokenizer = content["lengths"], content["tokenizer"]
    print(f"{prefix}: {content['documents']:,} documents, {content['tokens']:,} tokens ({content['dtype']})")
    print("tokens per document: " + "  ".join(f"{name} {value:,}" for name, value in lengths.items()))
    if "tokens_in_loss" in content:
        print(f"conversations: {content['tokens_in_loss']:,} tokens count in the loss")
    print(f"skipped: {content['empty_documents']:,} empty, {content['malformed']['count']:,} malformed")
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
    spec = TokenizerSpec(**fields)
    tokenizer = chat.load_chat(spec) if spec.is_chat else load(spec)
    number = args.document % count
    # The ids are a view of the memory-mapped data set, which upstream unmaps when the data set is deleted.
    dataset = indexed_dataset().IndexedDataset(args.prefix)
    ids = dataset[number].tolist()
    in_loss = f", {int(Conversations(args.prefix)[number].loss_mask.sum()):,} in the loss" if spec.is_chat else ""
    print(f"document {number}: {len(ids):,} tokens{in_loss}")
    text = tokenizer.decode(ids)
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", errors="replace"))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
