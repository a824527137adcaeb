"""Upstream, given the printed flags, sees the vocabulary and eod of the output and builds its GPT data set on it."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

from megatron.longseq.data import manifest
from megatron.longseq.data.__main__ import main
from megatron.longseq.data.encode import shard_dtype

TEXTS = [f"Document {i} says: {'long sequences want long documents. ' * (i % 7 + 1)}" for i in range(60)]


def upstream_arguments(prefix: str, capsys) -> argparse.Namespace:
    """Parse what `flags` prints with upstream's own tokenizer arguments."""
    from megatron.training.arguments import _add_tokenizer_args

    capsys.readouterr()
    assert main(["flags", prefix]) == 0
    parser = _add_tokenizer_args(argparse.ArgumentParser())
    parser.add_argument("--data-path", nargs="*")
    parser.add_argument("--split")
    args = parser.parse_args(capsys.readouterr().out.split())
    args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, args.rank = 128, 1, 0
    return args


def prepare(tmp_path: Path, *options: str) -> str:
    path, out = tmp_path / "in.jsonl", str(tmp_path / "out")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert main(["prepare", str(path), "--output", out, *options]) == 0
    return out


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> Path:
    """Train a small byte-pair tokenizer; its file also asks to cut at 8 tokens, to pad, and to put a BOS in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<bos>", "<end>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16, pad_id=2, pad_token="<pad>")
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_upstream_sees_the_byte_vocabulary_and_trains_on_the_documents(tmp_path, capsys):
    out = prepare(tmp_path)
    args = upstream_arguments(out, capsys)
    tokenizer = build_tokenizer(args)
    assert (tokenizer.vocab_size, tokenizer.eod, args.padded_vocab_size) == (257, 256, 384)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=128,
        blend=(args.data_path, None),
        split="80,10,10",
        tokenizer=tokenizer,
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=True,
        mid_level_dataset_surplus=0.005,
    )
    train, valid, test = BlendedMegatronDatasetBuilder(GPTDataset, [50, 4, 4], lambda: True, config).build()
    assert [len(part.indices) for part in (train, valid, test)] == [48, 6, 6]
    corpus = b"\0".join(text.encode() for text in TEXTS)
    for sample in (train[i] for i in range(50)):
        tokens = sample["tokens"]
        assert tokens.shape == (128,) and int(tokens.max()) <= 256
        assert torch.equal(sample["loss_mask"] == 0, tokens == 256)
        for run in bytes(0 if t == 256 else t for t in tokens.tolist()).split(b"\0"):
            assert run in corpus
    # Upstream keeps its sample indices here by default; the overwrite test relies on the place.
    assert list((Path(out) / "cache/GPTDataset_indices").iterdir())


def test_a_tokenizer_file_gives_its_own_ids_uncut_and_upstream_its_vocabulary(tmp_path, capsysbinary, tokenizer_file):
    from tokenizers import Tokenizer

    out = prepare(tmp_path, "--tokenizer-model", str(tokenizer_file), "--eod-token", "<end>", "--workers", "2")
    reference = Tokenizer.from_file(str(tokenizer_file))
    reference.no_truncation()
    reference.no_padding()
    dataset = IndexedDataset(out)
    assert [ids.tolist() for ids in dataset] == [[*reference.encode(text).ids, 1] for text in TEXTS]
    assert manifest.read(out)["lengths"]["max"] > 8
    capsysbinary.readouterr()
    assert main(["inspect", out, "--document", "6"]) == 0
    assert capsysbinary.readouterr().out.decode().endswith(f"tokens\n<bos>{TEXTS[6]}")


def test_upstream_sees_the_vocabulary_of_a_tokenizer_file(tmp_path, capsys, tokenizer_file):
    config = tokenizer_file.with_name("tokenizer_config.json")
    config.write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    try:
        out = prepare(tmp_path, "--tokenizer-model", str(tokenizer_file), "--no-special-tokens")
    finally:
        config.unlink()
    tokenizer = build_tokenizer(upstream_arguments(out, capsys))
    assert (tokenizer.vocab_size, tokenizer.eod) == (320, 1)
    dataset = IndexedDataset(out)
    assert not any((ids == 0).any() for ids in dataset)


def test_a_tokenizer_without_an_end_is_refused_and_a_changed_one_is_noticed(tmp_path, capsys, tokenizer_file):
    path = tmp_path / "in.txt"
    path.write_text("some text")
    command = ["prepare", str(path), "--output", str(tmp_path / "out"), "--tokenizer-model", str(tokenizer_file)]
    assert main(command) == 1
    assert "give --eod-token (special tokens: <bos>, <end>, <pad>)" in capsys.readouterr().err
    assert main([*command, "--eod-token", "<nope>"]) == 1
    assert "has no token '<nope>'" in capsys.readouterr().err
    assert main([*command, "--eod-token", "<end>"]) == 0
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes(tokenizer_file.read_bytes())
    command[-1] = str(copy)
    assert main([*command, "--eod-token", "<end>"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    copy.write_bytes(tokenizer_file.read_bytes() + b"\n")
    assert main([*command, "--eod-token", "<end>"]) == 1
    assert "tokenizer.sha256: " in capsys.readouterr().err


def test_a_tokenizer_that_ends_documents_itself_gets_no_second_end(tmp_path, tokenizer_file):
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    out = prepare(tmp_path, "--tokenizer-model", str(tmp_path / "tokenizer.json"), "--eod-token", "<end>")
    dataset = IndexedDataset(out)
    assert all(ids.tolist().count(1) == 1 and ids[-1] == 1 for ids in dataset)


def test_our_shard_type_holds_every_id():
    for size in (257, 65_499, 65_500, 65_536, 65_537, 200_000):
        assert size - 1 <= torch.iinfo(getattr(torch, shard_dtype(size).__name__)).max
