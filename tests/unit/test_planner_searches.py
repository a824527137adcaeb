"""Training accepts every plan that searches of many models, clusters and lengths print."""

import json
import shlex
from pathlib import Path

import pytest

from megatron.longseq.planner.tools.cli import main
from tests.pool import RankPool
from tests.unit.test_planner_documents import write_corpus
from tests.unit.test_planner_launch import validate

pytestmark = pytest.mark.slow  # about 10 seconds of processor time each

MISTRAL = {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
MISTRAL |= {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "sliding_window": 4096}


@pytest.mark.parametrize(
    ("model", "machine", "gpus", "rest"),
    [
        ("llama-7b", "a800", 64, "--seq-length 128K --global-batch-tokens 4M"),
        ("llama3-70b", "h100", 1024, "--seq-length 32K --global-batch-tokens 16M"),
        ("gpt3-175b", "a100", 512, "--seq-length 2K --global-batch-size 1536"),
        ("llama2-70b", "a100-40g", 256, "--seq-length 4K --global-batch-size 1024"),
        ("qwen3-32b", "h800", 128, "--seq-length 65536 --global-batch-size 128"),
        ("llama-13b", "a800", 16, "--seq-length 100K --global-batch-size 8"),
        ("llama-65b", "a800", 1024, "--seq-length 256K --global-batch-tokens 8M"),
        ("llama3-8b", "b200", 8, "--seq-length 1M --global-batch-size 1"),
        ("mpt-1b", "a100", 1, "--seq-length 8K --global-batch-size 16 --set attention_dropout=0"),
        ("config.json", "h200", 24, "--seq-length 32K --global-batch-size 96"),
        ("llama-7b", "a800", 64, "--seq-length 192K --global-batch-size 256 --lengths commoncrawl --length-steps 1"),
        ("llama3-8b", "h100", 32, "--seq-length 64K --global-batch-tokens 2M --lengths github --length-steps 1"),
    ],
    ids=str,
)
def test_training_accepts_every_printed_plan(
    ranks: RankPool, model: str, machine: str, gpus: int, rest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if model == "config.json":
        (tmp_path / model).write_text(json.dumps(MISTRAL))
        model = str(tmp_path)
    words = ["search", "--model", model, "--cluster", f"{machine}-{gpus}", *rest.split(), "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["plans"]
    assert found and all(plan["fits"] and not plan["reasons"] for plan in found)
    prefix = ranks.run(1, write_corpus, tmp_path / "text")[0] if "--lengths" in words else ""
    for plan in found:
        command = shlex.split(plan["command"].replace("\\\n", " "))
        flags = [prefix if word == "DATA" else word for word in command[command.index("--") + 2 :]]
        node = int(command[command.index("--gpus-per-node") + 1])
        nodes = int(command[command.index("--nodes") + 1]) if "--nodes" in command else 1
        assert nodes * node == gpus
        (settled,) = ranks.run(1, validate, flags, gpus, node)
        sizes = plan["flags"]
        size = sizes["tensor_model_parallel_size"] * sizes["pipeline_model_parallel_size"]
        assert settled["data_parallel_size"] == gpus // (size * sizes.get("context_parallel_size", 1))
