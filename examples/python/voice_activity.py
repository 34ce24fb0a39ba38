"""Quantizes Silero VAD, which hears where people speak, and compares the marks, file size and speed
with float.

Its convolutions are quantized. Two things stay float: the Fourier transform, a convolution that is
excluded by name, and the LSTM cell, which has two fifths of the weights.

Model: the package silero-vad of PyPI (MIT) has the weights as safetensors
  pip download --no-deps silero-vad==6.2.3
  unzip silero_vad-*.whl
  CHECKPOINT is silero_vad/data/silero_vad_16k.safetensors
Recordings: WAV files of 16 bits, 16,000 samples a second or a whole multiple. Debian's package
alsa-utils has eight of speech and one of noise in /usr/share/sounds/alsa. All of them calibrate."""

import argparse
import copy
import math
import sys
import time
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import quantal
import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

RATE = 16_000  # samples a second
CHUNK = 512  # samples that give one probability
CONTEXT = 64  # samples of the chunk before, which the network wants again

# Name: weights, activations ("int8" is calibrated). None: float.
SCHEMES: dict[str, tuple[str, str | None] | None] = {
    "float": None,
    "int8": ("int8", None),
    "float8": ("float8", None),
    "int4": ("int4", None),
    "int8-dynamic8": ("int8", "dynamic-int8"),
    "int8-static8": ("int8", "int8"),
}

State = tuple[torch.Tensor, torch.Tensor]


class SileroVAD(nn.Module):
    """The network for 16 kHz, with the names of its checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, samples: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """(n, CONTEXT + CHUNK) samples to (n) probabilities of speech."""
        padded = nn.functional.pad(samples.unsqueeze(1), (0, 64), "reflect")
        real, imaginary = self.stft_conv(padded).chunk(2, dim=1)
        x = (real.square() + imaginary.square()).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        state = self.lstm_cell(x.squeeze(-1), state)
        return self.final_conv(state[0].relu().unsqueeze(-1)).sigmoid().flatten(), state


@dataclass
class Result:
    """One line of the table."""

    scheme: str
    same: float
    difference: float
    file_bytes: int


def fail(path: Path, text: str) -> SystemExit:
    """An error that names a file."""
    return SystemExit(f"voice_activity: error: {path}: {text}")


def read_wave(path: Path) -> torch.Tensor:
    """Samples at 16 kHz, from -1 to 1, of all channels together."""
    try:
        with wave.open(str(path)) as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise fail(path, str(error)) from error
    if width != 2 or rate % RATE != 0:
        raise fail(path, f"expected 16 bits at a multiple of {RATE} Hz, got {8 * width} at {rate}")
    samples = np.frombuffer(data, dtype="<i2").reshape(-1, channels).mean(1, dtype=np.float32)
    return lower_rate(torch.from_numpy(samples) / 2**15, rate // RATE)


def lower_rate(samples: torch.Tensor, factor: int) -> torch.Tensor:
    """Every `factor`-th sample of what a low-pass filter, a windowed sinc, leaves."""
    if factor == 1:
        return samples
    reach = 16 * factor
    taps = torch.sinc(torch.arange(-reach, reach + 1) / factor)
    taps *= torch.hann_window(2 * reach + 1, periodic=False)
    filtered = nn.functional.conv1d(
        samples.view(1, 1, -1), (taps / taps.sum()).view(1, 1, -1), stride=factor, padding=reach
    )
    return filtered.flatten()


def load_model(checkpoint: Path) -> SileroVAD:
    """The float network."""
    if not checkpoint.exists():
        raise fail(checkpoint, "no such file. --help says where to get it")
    model = SileroVAD()
    model.load_state_dict(load_file(checkpoint))
    return model.eval()


def speech(model: nn.Module, recording: torch.Tensor) -> torch.Tensor:
    """A probability for each chunk of a recording."""
    state = (torch.zeros(1, 128), torch.zeros(1, 128))
    padded = nn.functional.pad(recording, (CONTEXT, -len(recording) % CHUNK))
    probabilities = []
    for samples in padded.unfold(0, CONTEXT + CHUNK, CHUNK):
        probability, state = model(samples.unsqueeze(0), state)
        probabilities.append(probability)
    return torch.cat(probabilities)


def hear(model: nn.Module, recordings: list[torch.Tensor], label: str) -> torch.Tensor:
    """The probabilities of all recordings, one after the other."""
    bar = tqdm(recordings, desc=label, unit="recording", leave=False)
    return torch.cat([speech(model, recording) for recording in bar])


def quantized(model: nn.Module, name: str, recordings: list[torch.Tensor]) -> nn.Module:
    """A copy of the model, quantized."""
    copied = copy.deepcopy(model)
    if SCHEMES[name] is None:
        return copied
    weights, activations = SCHEMES[name]
    quantal.quantize(copied, weights=weights, activations=activations, exclude="stft_conv")
    if activations == "int8":
        with quantal.Calibration(copied):
            hear(copied, recordings, f"calibrate {name}")
    quantal.freeze(copied)
    return copied


def milliseconds(models: list[nn.Module], recording: torch.Tensor, rounds: int) -> list[float]:
    """Of a chunk in each model's fastest run. They take turns: a machine that slows slows all."""
    times = [math.inf] * len(models)
    chunks = math.ceil(len(recording) / CHUNK)
    for _ in tqdm(range(rounds), desc="time", unit="round", leave=False):
        for i, model in enumerate(models):
            start = time.perf_counter()
            speech(model, recording)
            times[i] = min(times[i], 1e3 * (time.perf_counter() - start) / chunks)
    return times


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="weights of Silero VAD, for 16 kHz")
    parser.add_argument("recordings", type=Path, nargs="+", help="WAV files")
    add = parser.add_argument
    add("--out", type=Path, default="results/voice_activity", help="for the models (%(default)s)")
    add("--rounds", type=int, default=20,
        help="timed runs of the first recording; the fastest counts (%(default)s)")  # fmt: skip
    add("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES, metavar="SCHEME",
        help=f"of {', '.join(SCHEMES)} (all)")  # fmt: skip
    return parser.parse_args()


def main() -> int:
    """Prints the tables."""
    a = parse_arguments()
    torch.set_grad_enabled(False)
    model = load_model(a.checkpoint)
    recordings = [read_wave(path) for path in a.recordings]
    for path, recording in zip(a.recordings, recordings, strict=True):
        marked = speech(model, recording) > 0.5
        seconds = marked.sum().item() * CHUNK / RATE
        print(f"{path.name:<24} speech in {seconds:.2f} of {len(recording) / RATE:.2f} s")
    expected = hear(model, recordings, "float")
    a.out.mkdir(parents=True, exist_ok=True)
    results, models = [], []
    for name in tqdm(a.schemes, unit="scheme"):
        path = a.out / f"{name}.safetensors"
        quantal.save(quantized(model, name, recordings), path)
        fresh = copy.deepcopy(model)
        quantal.requantize(fresh, path)
        heard = hear(fresh, recordings, name)
        same = 100 * ((heard > 0.5) == (expected > 0.5)).double().mean().item()
        most = (heard - expected).abs().max().item()
        results.append(Result(name, same, most, path.stat().st_size))
        models.append(fresh)
    times = milliseconds(models, recordings[0], a.rounds)
    print(f"{'scheme':<15} {'same marks':>11} {'most apart':>11} {'bytes':>11} {'a chunk':>12}")
    for r, time_of_chunk in zip(results, times, strict=True):
        print(
            f"{r.scheme:<15} {r.same:>9.1f} % {r.difference:>11.4f} {r.file_bytes:>11,} "
            f"{time_of_chunk:>9.3f} ms"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
