"""Conversations for upstream's SFT data set, with a tokenizer of 256 words that is made here."""

import json
import random
from pathlib import Path

WORDS = 256
SPECIAL = ("<unk>", "<eos>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>", "<SPECIAL_233>")  # upstream's templates'
ROLES = ("System", "User", "Assistant")


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of whole words that Hugging Face's transformers loads without a network."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *ROLES, *(f"w{number}" for number in range(WORDS - len(SPECIAL) - len(ROLES)))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[2:])})
    fast.save_pretrained(folder)
    return folder


def write_conversations(path: Path, lines: int, seed: int = 1) -> Path:
    """Write packed conversations of unlike lengths, each line of at most 63 tokens, padding included."""
    draw = random.Random(seed)

    def words(least: int, most: int) -> str:
        first = draw.randrange(8)  # few, so that a model learns within some steps
        return " ".join(f"w{(first + step) % 240}" for step in range(draw.randint(least, most)))

    with path.open("w") as file:
        for _ in range(lines):
            messages = []
            for _ in range(draw.randint(1, 3)):
                messages.append({"role": "system", "content": words(1, 2)})
                messages.append({"role": "user", "content": words(1, 3)})
                messages.append({"role": "assistant", "content": words(3, 8)})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def sft_flags(folder: Path) -> list[str]:
    """Write both, and return upstream's flags that train on them."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    data = write_conversations(folder / "conversations.jsonl", 200)
    return [
        *("--sft", "--data-path", str(data), "--split", "1,0,0"),
        *("--tokenizer-type", "SFTTokenizer", "--tokenizer-model", str(tokenizer)),
        *("--sft-tokenizer-prompt-format", "nemotron-h-aligned"),
    ]


def write_packs(folder: Path, prefix: str, tokens: int) -> Path:
    """Write a line for each pack of the prepared conversations of `folder`, which all begin with a system message."""
    from megatron.longseq.data.conversations import Conversations
    from megatron.longseq.data.packing import pack_in_order
    from megatron.longseq.data.shards import split_conversations

    lines = [json.loads(line)["messages"] for line in (folder / "conversations.jsonl").read_text().splitlines()]
    every = [conversation for line in lines for conversation in split_conversations(line)]
    path = folder / "packs.jsonl"
    with path.open("w") as file:
        for pack in pack_in_order(Conversations(prefix).lengths, tokens):
            file.write(json.dumps({"messages": [message for number in pack for message in every[number]]}) + "\n")
    return path
