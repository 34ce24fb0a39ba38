"""The programs of examples/ that need transformers, on small models of random weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[3]
WORDS = [f"word{i}" for i in range(90)]


def run(program: str, *options: object) -> list[str]:
    """The lines that it prints."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "python"),
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, ROOT / "examples" / "python" / program, *options]
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def save_tokenizer(folder: Path) -> None:
    """One token a word."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {word: i for i, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of its words."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[i * i % 90] for i in range(200)))
    return path


def test_causal_lm(llama_folder: Path, text: Path) -> None:
    save_tokenizer(llama_folder)
    options = ("--text", text, "--prompt", 16, "--tokens", 2, "--rounds", 1, "--dtype", "float32")
    rows = {
        line.split()[0]: line.split()[1:]
        for line in run("causal_lm.py", llama_folder, *options)[1:]
    }
    perplexities = {scheme: float(row[1]) for scheme, row in rows.items()}
    assert perplexities["int8"] == pytest.approx(perplexities["float32"], rel=0.01)
    assert float(rows["int4"][0]) < float(rows["float32"][0])


def test_quantized_cache(llama_folder: Path, text: Path) -> None:
    save_tokenizer(llama_folder)
    options = ("--prompt", 24, "--tokens", 20, "--residual", 8, "--group-size", 16)
    lines = run("quantized_cache.py", llama_folder, text, *options)
    rows = {line[:20].strip(): line[20:].split() for line in lines[1:6]}
    assert list(rows) == [
        *("float", "int4", "int4, channel keys", "int2", "int2, channel keys"),
    ]
    # Two layers, keys and values, two heads of 16 channels in fp32; the last token is not cached.
    assert float(rows["float"][0]) == pytest.approx(43 * 2 * 2 * 2 * 16 * 4 / 1e3, abs=0.1)
    assert float(rows["int2"][0]) < float(rows["int4"][0]) < float(rows["float"][0]) / 2
    assert int(rows["float"][2]) == 20
    for row in rows.values():
        assert float(row[1]) == pytest.approx(float(rows["float"][1]), rel=0.05)
    texts = [line for line in lines[6:] if line]
    assert [line.split(":")[0] for line in texts] == list(rows)
    assert all(len(line.split(": ")[1].split()) == 20 for line in texts)


def test_sentence_encoder(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    sentences = [" ".join(WORDS[i * j % 90] for j in range(10 + i % 5)) for i in range(1, 12)]
    (tmp_path / "sentences.txt").write_text("\n".join([*sentences, "too short"]))
    options = ("--batch-size", 4, "--tokens", 24, "--rounds", 1)
    lines = run("sentence_encoder.py", tmp_path / "bert", tmp_path / "sentences.txt", *options)
    rows = {line.split()[0]: [float(x) for x in line.replace("%", "").split()[1:]]
            for line in lines[2:]}  # fmt: skip
    assert len(rows) == 8
    least = {scheme: row[2] for scheme, row in rows.items()}
    assert least["float32"] == 1
    assert least["int8"] > 0.999
    assert least["int8-all-a8"] > 0.99
    assert 0.9 < least["int4-all-a8"] < least["int8-all-a8"]
    assert rows["int4-all-a8"][0] < rows["int8"][0] < rows["float32"][0]
