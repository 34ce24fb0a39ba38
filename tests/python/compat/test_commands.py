"""``optimum-cli quanto quantize``, on Quantal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import quantal
import torch
from optimum.quanto import QuantizedModelForCausalLM

pytest.importorskip("optimum.commands.optimum_cli", reason="no optimum")

ROOT = Path(__file__).parents[3]
CLI = Path(sys.executable).with_name("optimum-cli")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantal.compat", CLI, "quanto", "quantize", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT / "python"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(part) for part in command], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("llama", ["untied"], indirect=True)
@pytest.mark.parametrize(
    ("options", "qtype", "dtype"),
    [
        ((), "qint8", torch.float32),
        (
            ("--weights", "int4", "--task", "text-generation", "--torch_dtype", "bf16"),
            "qint4",
            torch.bfloat16,
        ),
    ],
)
def test_quantizes_a_folder(
    llama, llama_folder, tokens, tmp_path, options: tuple[str, ...], qtype: str, dtype: torch.dtype
) -> None:
    done = run(tmp_path / "out", "-m", llama_folder, *options)
    assert done.returncode == 0, done.stderr
    model = QuantizedModelForCausalLM.from_pretrained(tmp_path / "out")
    quantal.quantize(llama.to(dtype), weights=qtype, exclude="model.embed_tokens")
    quantal.freeze(llama)
    assert quantal.quantization_map(model._wrapped) == quantal.quantization_map(llama)
    for key, tensor in llama.state_dict().items():
        assert torch.equal(model.state_dict()[key].float(), tensor.float()), key
    assert model(tokens).logits.dtype == dtype


@pytest.mark.parametrize("llama", ["untied"], indirect=True)
def test_what_is_wrong_is_said(llama_folder, tmp_path) -> None:
    done = run(tmp_path / "out", "-m", llama_folder, "--weights", "int3")
    assert done.returncode == 2
    assert "invalid choice: 'int3'" in done.stderr
    (llama_folder / "config.json").write_text('{"model_type": "llama", "architectures": ["Mine"]}')
    done = run(tmp_path / "out", "-m", llama_folder)
    assert "names Mine, which transformers has not: say --task" in done.stderr
