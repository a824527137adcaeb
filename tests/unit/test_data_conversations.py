"""Prepared conversations have the tokens and the loss mask of upstream's own `--sft` path, and stay whole."""

import json
from argparse import ArgumentParser
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.longseq.data import DataError, manifest
from megatron.longseq.data.__main__ import main
from megatron.longseq.data.chat import PROMPT_FORMATS
from megatron.longseq.data.conversations import Conversations
from megatron.longseq.data.validate import check_datasets

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' }}{% endfor %}"
)
SEQUENCE = 160


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def turns(number: int, rounds: int) -> list[dict[str, str]]:
    """Return a conversation of some rounds; every third one has no system message."""
    system = [message("system", f"Answer in {number} words. /think")] if number % 3 else []
    pairs = [
        (message("user", f"Question {number}.{i}: why?  "), message("assistant", f"Because {i} " * (number + 1)))
        for i in range(rounds)
    ]
    return [*system, *(one for pair in pairs for one in pair)]


# One line of several conversations, one that is longer than a sample, one without an answer, one with padding inside.
LINES = [
    turns(1, 1),
    [*turns(3, 1), *turns(1, 2), *turns(2, 1)],
    turns(7, 9),
    turns(6, 2),
    [message("system", "Say nothing."), message("user", "Hello")],
    [message("user", "Which pad?"), message("assistant", "One of <unk> <pad> <SPECIAL_233> .")],
]
CONVERSATIONS = [1, 3, 1, 1, 1, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a byte-pair tokenizer with the tokens of every prompt format, as transformers saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"]
    special += [f"<SPECIAL_{number}>" for number in (10, 11, 12, 233)]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([one["content"] for line in LINES for one in line], trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    whole.chat_template = TEMPLATE
    path = tmp_path_factory.mktemp("chat") / "tokenizer"
    whole.save_pretrained(path)
    return path


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "messages": line}) + "\n" for i, line in enumerate(lines)))
    return path


def prepare(path: Path, out: Path, folder: Path, *options: str) -> int:
    command = ["prepare", str(path), "--output", str(out), "--format", "conversations", "--workers", "1"]
    return main([*command, "--tokenizer-model", str(folder), *options])


def config_of(path: Path, tokenizer: Any, ranks: int = 1) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    return GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQUENCE,
        blend=([str(path)], None),
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        context_parallel_size=ranks,
    )


def sft_tokenizer(folder: Path, prompt_format: str) -> Any:
    from megatron.core.tokenizers import MegatronTokenizer

    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(folder), metadata_path={"library": "sft"}, prompt_format=prompt_format
    )


def build(dataset: Any, path: Path, config: Any, samples: int | None = None) -> Any:
    """Build a data set of all documents of a path, as upstream's builder does."""
    from megatron.core.datasets.utils import Split

    low_level = dataset.build_low_level_dataset(str(path), config)
    count = dataset.numel_low_level_dataset(low_level)
    return dataset(low_level, str(path), np.arange(count), samples or count, Split.train, config)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `datasets` write its cache into the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("prompt_format", PROMPT_FORMATS)
def test_tokens_and_mask_are_those_of_upstreams_sft(tmp_path: Path, folder: Path, prompt_format: str) -> None:
    from megatron.training.datasets.sft_dataset import SFTDataset

    path = write(tmp_path / "chat.jsonl", LINES)
    assert prepare(path, tmp_path / "out", folder, "--sft-tokenizer-prompt-format", prompt_format) == 0
    tokenizer = sft_tokenizer(folder, prompt_format)
    upstream = build(SFTDataset, path, config_of(path, tokenizer))
    ours = Conversations(str(tmp_path / "out"))
    assert len(ours) == sum(CONVERSATIONS)
    first = 0
    for number, count in enumerate(CONVERSATIONS):
        parts = [ours[i] for i in range(first, first + count)]
        first += count
        room = SEQUENCE + 1
        ids = np.concatenate([*(part.ids for part in parts), np.full(room, tokenizer.pad)]).astype(np.int64)[:room]
        mask = np.concatenate([*(part.loss_mask for part in parts), np.zeros(room)])[:room]
        if sum(len(part.ids) for part in parts) >= room:  # upstream puts a padding token behind a sample that is cut
            ids[-1], mask[-1] = tokenizer.pad, 0
        sample = upstream[number]
        assert torch.equal(sample["tokens"], torch.from_numpy(ids[:-1]))
        assert torch.equal(sample["loss_mask"], torch.from_numpy(mask[1:]).float())
        counts = sample["loss_mask"] > 0
        assert torch.equal(sample["labels"][counts], torch.from_numpy(ids[1:])[counts])
        assert len(parts[0].ids) < room or number == 2
    assert max(ours.lengths) > SEQUENCE  # a conversation that is longer than a sample is not cut here
    content = manifest.read(str(tmp_path / "out"))
    assert content["tokens_in_loss"] == sum(int(ours[i].loss_mask.sum()) for i in range(len(ours)))
    assert 0 < content["tokens_in_loss"] < content["tokens"] or prompt_format in ("default", "identity")


def test_shards_and_shuffling_keep_conversations_and_their_masks_whole(
    tmp_path: Path, folder: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = write(tmp_path / "chat.jsonl", LINES * 7)
    for name, options in {"a": [], "b": ["--shard-mb", "0.0002"], "c": ["--shuffle-seed", "5"]}.items():
        assert prepare(path, tmp_path / name, folder, *options) == 0
    for suffix in (".bin", ".idx", ".loss_mask.bin", ".loss_mask.idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    in_order, shuffled = (Conversations(str(tmp_path / name)) for name in "ac")

    def content(conversations: Conversations) -> list[bytes]:
        return [
            conversations[i].ids.tobytes() + conversations[i].loss_mask.tobytes() for i in range(len(conversations))
        ]

    assert content(in_order) != content(shuffled) and sorted(content(in_order)) == sorted(content(shuffled))
    capsysbinary.readouterr()
    assert main(["inspect", str(tmp_path / "a"), "--document", "0"]) == 0
    error = capsysbinary.readouterr().out.decode()
    assert f"{len(in_order[0].ids)} tokens, {in_order[0].loss_mask.sum()} in the loss" in error
    assert error.endswith("Because 0 Because 0\n")


MALFORMED = {
    "none": ({"text": "x"}, "no key 'messages' (its keys: text)"),
    "no list": ({"messages": "x"}, "key 'messages' holds a string, not a list of messages"),
    "no message": ({"messages": ["x"]}, "message 0: expected a JSON object, found a string"),
    "no content": ({"messages": [{"role": "user"}]}, "message 0: no key 'content' (its keys: role)"),
    "no text": ({"messages": [{"role": "user", "content": None}]}, "message 0: key 'content' holds null, not a string"),
    "empty answer": (
        {"messages": [message("user", "x"), message("assistant", "")]},
        "the chat template refuses the conversation (ValueError: empty assistant turn",
    ),
    "unknown role": ({"messages": [message("cat", "x")]}, "the chat template refuses the conversation (ValueError: "),
}


def test_malformed_conversations_are_named(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "chat.jsonl"
    lines = [{"messages": LINES[0]}, {"messages": []}, *(line for line, _ in MALFORMED.values())]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert prepare(path, tmp_path / "out", folder) == 1
    error = capsys.readouterr().err
    for number, (_, reason) in enumerate(MALFORMED.values(), start=3):
        assert f"{path}:{number}: {reason}" in error
    assert not list(tmp_path.glob("out*"))
    assert prepare(path, tmp_path / "out", folder, "--skip-malformed") == 0
    content = manifest.read(str(tmp_path / "out"))
    found = content["documents"], content["empty_documents"], content["malformed"]["count"]
    assert found == (1, 1, len(MALFORMED))


def test_what_conversations_cannot_have_is_refused(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "chat.jsonl", LINES)
    cases = {
        ("--format", "jsonl", "--json-key", "messages", "--sft-tokenizer-prompt-format", "default"): "belongs to",
        ("--no-append-eod",): "the chat template determines all tokens",
        ("--tokenizer-model", str(folder / "tokenizer.json")): "require the local folder of a Hugging Face tokenizer",
        ("--tokenizer-model", str(tmp_path)): "not a Hugging Face tokenizer",
    }
    for options, reason in cases.items():
        assert prepare(path, tmp_path / "out", folder, *options) == 1
        assert reason in capsys.readouterr().err


def test_a_damaged_or_foreign_loss_mask_is_refused(tmp_path: Path, folder: Path) -> None:
    out, other = str(tmp_path / "out"), str(tmp_path / "other")
    assert prepare(write(tmp_path / "chat.jsonl", LINES), tmp_path / "out", folder) == 0
    assert prepare(write(tmp_path / "more.jsonl", LINES[::-1]), tmp_path / "other", folder) == 0
    check = partial(
        check_datasets,
        ([out], None),
        None,
        split="1,0,0",
        sequence=8,
        full_validation=False,
        separate_validation=False,
    )
    check()
    for suffix in (".bin", ".idx"):  # of the same number of conversations and tokens
        Path(f"{out}.loss_mask{suffix}").write_bytes(Path(f"{other}.loss_mask{suffix}").read_bytes())
    with pytest.raises(DataError, match="holds the loss mask of other conversations"):
        Conversations(out)
    with pytest.raises(ValueError, match="is not the loss mask of the conversations of"):
        check()
    Path(f"{out}.loss_mask.bin").write_bytes(b"1")
    with pytest.raises(DataError, match=r"out\.loss_mask\.bin has 1 bytes"):
        Conversations(out)
    with pytest.raises(DataError, match="holds documents, not conversations"):
        text = tmp_path / "text.txt"
        text.write_text("text")
        assert main(["prepare", str(text), "--output", str(tmp_path / "text"), "--workers", "1"]) == 0
        Conversations(str(tmp_path / "text"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_samples_are_those_of_upstream_for_the_same_conversations(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], ranks: int
) -> None:
    """Samples from prepared files equal upstream's samples from jsonl lines with the same conversations."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import _add_tokenizer_args
    from megatron.training.datasets.sft_dataset import SFTDataset

    from megatron.longseq.conversation_dataset import ConversationDataset

    sizes = [(1, 1), (5, 2), (1, 1), (1, 1), (4, 2), (2, 1), (1, 1), (7, 1), (1, 1), (1, 2), (2, 1), (1, 1), (8, 9)]
    systems = [turns(number, rounds) for number, rounds in sizes]
    path = write(tmp_path / "chat.jsonl", systems)
    assert prepare(path, tmp_path / "out", folder) == 0
    capsys.readouterr()
    assert main(["flags", str(tmp_path / "out")]) == 0
    parser = _add_tokenizer_args(ArgumentParser())
    parser.add_argument("--sft", action="store_true")
    parser.add_argument("--data-path", type=Path)
    args, _ = parser.parse_known_args(capsys.readouterr().out.split())
    args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, args.rank = 128, 1, 0
    assert args.sft and args.data_path == tmp_path / "out"
    ours = build(ConversationDataset, args.data_path, config_of(args.data_path, build_tokenizer(args), ranks))
    packs = [[int(number) for number in pack] for pack in ours.dataset]
    assert sorted(number for pack in packs for number in pack) == list(range(len(systems)))
    assert 1 < len(packs) < len(systems) and max(map(len, packs)) > 2
    lines = write(tmp_path / "packs.jsonl", [[one for number in pack for one in systems[number]] for pack in packs])
    tokenizer = sft_tokenizer(folder, PROMPT_FORMATS[0])
    upstream = build(SFTDataset, lines, config_of(lines, tokenizer, ranks))
    for number, pack in enumerate(packs):
        sample, expected = ours[number], upstream[number]
        for name in ("tokens", "loss_mask", "position_ids", "cu_seqlens", "max_seqlen"):
            assert torch.equal(sample[name], expected[name]), name
        counts = expected["loss_mask"] > 0
        assert torch.equal(sample["labels"][counts], expected["labels"][counts])
        # All conversations are whole; the one that is longer than a sample is alone in it, and cut.
        assert len(set(sample["cu_seqlens"].tolist())) == len(pack) + 1
        assert len(systems) - 1 not in pack or len(pack) == 1
    assert torch.equal(ours[0]["tokens"], ours[len(packs)]["tokens"])  # the next epoch
    fromjsonl = build(ConversationDataset, lines, config_of(lines, tokenizer, ranks))
    assert torch.equal(fromjsonl[0]["tokens"], upstream[0]["tokens"])


def test_a_run_with_another_tokenizer_is_refused(tmp_path: Path, folder: Path) -> None:
    from megatron.longseq.conversation_dataset import ConversationDataset

    assert prepare(write(tmp_path / "chat.jsonl", LINES), tmp_path / "out", folder) == 0
    other = sft_tokenizer(folder, "identity")  # pads with another token
    with pytest.raises(ValueError, match="was prepared with a tokenizer whose padding"):
        build(ConversationDataset, tmp_path / "out", config_of(tmp_path / "out", other))
