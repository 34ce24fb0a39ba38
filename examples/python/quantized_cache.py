"""Generates text with a language model whose cache of keys and values is quantized, and compares
bytes, perplexity, text and speed with the float cache.

The caches are transformers' own: `import quantal.compat` makes their backend "quanto" run on
Quantal. Recent tokens stay float until there are --residual of them."""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quantal.compat  # noqa: F401  before transformers
import torch
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedModel,
    QuantizedCache,
)

# Name: what cache_config takes. None: float. Groups run along a token's channels (axis 0), or along
# the tokens of a channel (axis -1), which keys of 2 bits need: few of their channels are large.
CACHES: dict[str, dict[str, int] | None] = {
    "float": None,
    "int4": {"nbits": 4, "axis_key": 0, "axis_value": 0},
    "int4, channel keys": {"nbits": 4, "axis_key": -1, "axis_value": 0},
    "int2": {"nbits": 2, "axis_key": 0, "axis_value": 0},
    "int2, channel keys": {"nbits": 2, "axis_key": -1, "axis_value": 0},
}


@dataclass
class Result:
    """One line of the table, and the text."""

    cache: str
    kilobytes: float
    perplexity: float
    same_tokens: int
    milliseconds: float
    text: str


def cache_config(name: str, a: argparse.Namespace) -> dict[str, Any] | None:
    """What generate() and QuantizedCache take; None: float."""
    kind = CACHES[name]
    sizes = {"q_group_size": a.group_size, "residual_length": a.residual}
    return kind and {"backend": "quanto", **kind, **sizes}


def nbytes(cache: Cache) -> int:
    """Of the tokens that are quantized, and of those that are not yet."""
    total = 0
    for layer in cache.layers:
        total += layer.keys.nbytes + layer.values.nbytes
        for name in ("_quantized_keys", "_quantized_values"):
            quantized = getattr(layer, name, None)
            if quantized is not None:
                parts = (quantized._data, quantized._scale, quantized._shift)
                total += sum(part.nbytes for part in parts)
    return total


def perplexity(
    model: PreTrainedModel, name: str, tokens: torch.Tensor, a: argparse.Namespace
) -> float:
    """Of the last quarter of each piece of the text, which sees the rest through the cache."""
    losses, length = [], a.prompt * 4 // 3
    windows = min(a.windows, len(tokens) // length)
    for piece in tokens[: windows * length].split(length):
        config = cache_config(name, a)
        cache = QuantizedCache(config=model.config, **config) if config else DynamicCache()
        model(piece[None, : a.prompt], past_key_values=cache, logits_to_keep=1)
        rest = piece[a.prompt :]
        logits = model(rest[None], past_key_values=cache).logits[0]
        losses.append(F.cross_entropy(logits[:-1].float(), rest[1:]).item())
    return math.exp(sum(losses) / len(losses)) if losses else math.nan


def measure(
    model: PreTrainedModel, tokenizer: Any, name: str, tokens: torch.Tensor, a: argparse.Namespace
) -> tuple[Result, torch.Tensor]:
    """One line of the table, and the tokens that were generated."""
    config = cache_config(name, a)
    prompt = tokens[None, : a.prompt]
    options = {"cache_implementation": "quantized", "cache_config": config} if config else {}
    start = time.perf_counter()
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=a.tokens,
        min_new_tokens=a.tokens,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )
    milliseconds = (time.perf_counter() - start) * 1e3 / a.tokens
    generated = made.sequences[0, a.prompt :]
    result = Result(
        name, nbytes(made.past_key_values) / 1e3, perplexity(model, name, tokens, a), 0,
        milliseconds, tokenizer.decode(generated),
    )  # fmt: skip
    return result, generated


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", help="folder of a transformers model, or its name on the hub")
    parser.add_argument("text", type=Path, help="text file that gives the prompt and perplexities")
    parser.add_argument("--gguf", help="name of a GGUF file in the folder (needs the gguf package)")
    parser.add_argument("--windows", type=int, default=8, help="pieces of the text")
    parser.add_argument("--prompt", type=int, default=384, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--group-size", type=int, default=64, help="values with one scale")
    parser.add_argument("--residual", type=int, default=64, help="recent tokens kept in float")
    parser.add_argument("--caches", nargs="+", default=list(CACHES), choices=CACHES)
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    return parser.parse_args()


def main() -> None:
    """Prints the table and the texts."""
    a = parse_arguments()
    torch.set_grad_enabled(False)
    source = {"gguf_file": a.gguf} if a.gguf else {}
    dtype = getattr(torch, a.dtype)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype, **source).eval()
    tokenizer = AutoTokenizer.from_pretrained(a.model, **source)
    tokens = tokenizer(a.text.read_text(), return_tensors="pt").input_ids[0]
    first, results = None, []
    for name in tqdm(a.caches, unit="cache"):
        result, generated = measure(model, tokenizer, name, tokens, a)
        first = generated if first is None else first
        # Tokens before the first that differs: after it the texts go their own ways.
        result.same_tokens = int((generated == first).long().cumprod(0).sum())
        results.append(result)
    print(f"{'cache':<20} {'kB':>9} {'perplexity':>11} {'same tokens':>12} {'a token':>12}")
    for r in results:
        print(
            f"{r.cache:<20} {r.kilobytes:>9.1f} {r.perplexity:>11.2f} {r.same_tokens:>12} "
            f"{r.milliseconds:>9.1f} ms"
        )
    for r in results:
        print(f"\n{r.cache}: {r.text}")


if __name__ == "__main__":
    main()
