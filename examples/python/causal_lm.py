"""Quantizes a language model in several ways and compares size, perplexity and speed with bf16.

The speeds are of this machine's CPU: the first token after a prompt, and those that follow it, also
in tokens a second."""

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from quantal import freeze, quantize
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

# Name: weights, activations. None: float.
SCHEMES: dict[str, tuple[str, str | None] | None] = {
    "float32": None,
    "bfloat16": None,
    "int8": ("qint8", None),
    "int8-a8": ("qint8", "dynamic-qint8"),
    "int4": ("qint4", None),
    "int4-a8": ("qint4", "dynamic-qint8"),
    "int2-a8": ("qint2", "dynamic-qint8"),
    "float8": ("qfloat8", None),
}


@dataclass
class Result:
    """One line of the table."""

    scheme: str
    megabytes: float
    perplexity: float
    first_ms: float
    next_ms: float


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", help="folder of a transformers model, or its name on the hub")
    parser.add_argument("--gguf", help="name of a GGUF file in the folder (needs the gguf package)")
    parser.add_argument("--text", type=Path, help="text file whose perplexity is found")
    parser.add_argument("--windows", type=int, default=4, help="pieces of the text")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs; the fastest counts")
    parser.add_argument("--turns", action="store_true",
                        help="keep all models in memory and let them take turns in each round: "
                             "for machines whose speed changes")  # fmt: skip
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"],
                        help="of the activations of quantized models")  # fmt: skip
    return parser.parse_args()


def quantized(model: PreTrainedModel, scheme: str, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of the model, with every linear layer quantized but the head."""
    copied = copy.deepcopy(model)
    kind = SCHEMES[scheme]
    if kind is None:
        return copied.to(getattr(torch, scheme))
    weights, activations = kind
    quantize(copied, weights=weights, activations=activations, exclude=["lm_head", "*embed*"])
    freeze(copied)
    return copied.to(dtype)


def megabytes(model: PreTrainedModel) -> float:
    """Of parameters and buffers."""
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) / 1e6


def perplexity(model: PreTrainedModel, tokens: torch.Tensor, windows: int) -> float:
    """Over `windows` pieces of 512 tokens."""
    losses = []
    for piece in tokens.split(512)[:windows]:
        losses.append(model(piece[None], labels=piece[None]).loss.item())
    return math.exp(sum(losses) / len(losses)) if losses else math.nan


def generate(model: PreTrainedModel, prompt: torch.Tensor, count: int) -> tuple[float, float]:
    """Milliseconds of the first token, and of each that follows."""
    start = time.perf_counter()
    step = model(prompt, use_cache=True, logits_to_keep=1)
    first = time.perf_counter()
    for _ in range(count):
        token = step.logits[:, -1:].argmax(-1)
        step = model(token, past_key_values=step.past_key_values, use_cache=True)
    end = time.perf_counter()
    return (first - start) * 1e3, (end - first) * 1e3 / max(count, 1)


def measure(
    models: dict[str, PreTrainedModel], text: torch.Tensor, a: argparse.Namespace
) -> list[Result]:
    """Lines of the table. The models take turns."""
    prompt = text[None, : a.prompt]
    runs = [
        [generate(model, prompt, a.tokens) for model in models.values()]
        for _ in range(a.rounds + 1)
    ][1:]
    windows = a.windows if a.text else 0
    results = []
    for (scheme, model), of_model in zip(models.items(), zip(*runs, strict=True), strict=True):
        first, following = (min(times) for times in zip(*of_model, strict=True))
        size, score = megabytes(model), perplexity(model, text, windows)
        results.append(Result(scheme, size, score, first, following))
    return results


def main() -> None:
    """Prints the table."""
    a = parse_arguments()
    torch.set_grad_enabled(False)
    source = {"gguf_file": a.gguf} if a.gguf else {}
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32, **source).eval()
    if a.text:
        tokenizer = AutoTokenizer.from_pretrained(a.model, **source)
        text = tokenizer(a.text.read_text(), return_tensors="pt").input_ids[0]
    else:
        text = torch.randint(0, model.config.vocab_size, (a.prompt,))
    results = []
    for schemes in tqdm([a.schemes] if a.turns else [[scheme] for scheme in a.schemes]):
        models = {scheme: quantized(model, scheme, getattr(torch, a.dtype)) for scheme in schemes}
        results += measure(models, text, a)
    print(
        f"{'scheme':<10} {'MB':>8} {'perplexity':>11} {'first token':>13} {'next token':>12} "
        f"{'tokens/s':>9}"
    )
    for r in results:
        found = "-" if math.isnan(r.perplexity) else f"{r.perplexity:.2f}"
        print(
            f"{r.scheme:<10} {r.megabytes:>8.1f} {found:>11} {r.first_ms:>10.1f} ms "
            f"{r.next_ms:>9.2f} ms {1e3 / r.next_ms:>9.1f}"
        )


if __name__ == "__main__":
    main()
