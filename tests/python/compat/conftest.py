"""Tests beside transformers, diffusers and peft, which scripts/compat-test.sh runs where those are
installed, and of what needs none of them, which run elsewhere."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HAS_TRANSFORMERS = find_spec("transformers") is not None
PLAIN = {
    *("test_call_forms.py", "test_import.py", "test_layouts.py", "test_memory.py"),
    "test_weight_kinds.py",
}
EVERYWHERE = {"test_surface.py"}
collect_ignore = [
    file.name
    for file in Path(__file__).parent.glob("test_*.py")
    if file.name not in EVERYWHERE and (file.name in PLAIN) == HAS_TRANSFORMERS
]

if HAS_TRANSFORMERS:
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import quantal.compat  # noqa: F401  before transformers
    from transformers import LlamaConfig, LlamaForCausalLM


def pytest_configure(config: pytest.Config) -> None:
    """What the libraries warn of themselves."""
    config.addinivalue_line("filterwarnings", "ignore:.*deprecated")


@pytest.fixture(params=["untied", "tied"])
def llama(request: pytest.FixtureRequest):
    """A small Llama, with and without its embeddings tied."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=128,
        tie_word_embeddings=request.param == "tied",
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def llama_folder(llama, tmp_path: Path) -> Path:
    """It, saved."""
    llama.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def tokens() -> torch.Tensor:
    """A prompt."""
    return torch.arange(9).reshape(1, 9) * 7 % 96
