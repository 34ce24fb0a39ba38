"""A process for each peer: what one library does to threads, memory or signals stays its own.

Environment variables that libraries read when they load are set before (`machine.py`). Between its
turns a process waits for the next command, so that its threads sleep while others are measured.
"""

import gc
import importlib
import multiprocessing
import os
import signal
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.peer import MAX_ERROR, Floats, Linears, Run, Scheme, UnavailableError

CHECKED_ROWS = 256  # outputs of a token that are compared with float64
CHECKED_TOKENS = 4


class WorkerDiedError(Exception):
    """The process of a peer ended or hung: the message says how."""


@dataclass(frozen=True)
class Timing:
    """Seconds a layer needs, over the calls of one round."""

    median: float
    least: float
    calls: int


def random_floats(seed: int, rows: int, columns: int) -> Floats:
    """The same normal numbers in every process."""
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def _spread(count: int, most: int) -> NDArray[np.intp]:
    """At most so many indices below `count`, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.intp))


class _Served:
    """The state of a peer's process: layers by scheme."""

    def __init__(self, peer: Any, threads: int) -> None:
        self.peer = peer
        self.threads = threads
        self.schemes = {scheme.name: scheme for scheme in peer.SCHEMES}
        self.linears: dict[str, Linears] = {}
        self.runs: dict[str, Run] = {}
        self.turns: dict[str, int] = {}
        self.weight: tuple[tuple[int, int, int], Floats] | None = None
        self.checked: NDArray[np.float64] = np.empty((0, 0))

    def prepare(self, name: str, rows: int, columns: int, copies: int, seed: int) -> int:
        """Makes the copies of a layer and returns the bytes of one copy's weight."""
        key = (rows, columns, seed)
        if self.weight is None or self.weight[0] != key:
            self.weight = key, random_floats(seed, rows, columns)
            self.checked = self.weight[1][_spread(rows, CHECKED_ROWS)].astype(np.float64)
        made = self.peer.make(self.schemes[name], self.weight[1], copies, self.threads)
        self.linears[name] = made
        return made.weight_bytes

    def drop_weight(self) -> None:
        """Frees the float weight once all schemes are prepared."""
        self.weight = None

    def bind(self, name: str, tokens: int, copies: int, seed: int) -> float:
        """Binds activations, checks the result against float64 and returns its relative error."""
        linears = self.linears[name]
        x = random_floats(seed, tokens, self.checked.shape[1])
        self.runs.pop(name, None)
        run = linears.bind(x, copies)
        y = run.output()
        some = _spread(tokens, CHECKED_TOKENS)
        expected = x[some].astype(np.float64) @ self.checked.T
        difference = y[some][:, _spread(y.shape[1], CHECKED_ROWS)] - expected
        error = float(np.linalg.norm(difference) / np.linalg.norm(expected))
        bound = MAX_ERROR[self.schemes[name].family]
        if not error <= bound:  # NaN, too
            raise UnavailableError(
                f"wrong result: relative error {error:.3g}, at most {bound} allowed"
            )
        self.runs[name] = run
        self.turns[name] = 0
        return error

    def measure(self, name: str, seconds: float, slow: float) -> Timing:
        """Calls a layer for so long. One call that takes longer than `slow` is enough."""
        run, turn = self.runs[name], self.turns[name]
        calls, layers = run.calls, run.layers_per_call
        gc.collect()
        gc.disable()
        begin = time.perf_counter()
        calls[turn % len(calls)]()  # wakes the threads
        taken = [time.perf_counter() - begin]
        turn += 1
        if taken[0] < slow:
            taken.clear()
            end = time.perf_counter() + seconds
            while len(taken) < 3 or time.perf_counter() < end:
                call = calls[turn % len(calls)]
                begin = time.perf_counter()
                call()
                taken.append(time.perf_counter() - begin)
                turn += 1
        gc.enable()
        self.turns[name] = turn
        return Timing(statistics.median(taken) / layers, min(taken) / layers, len(taken) * layers)

    def drop_runs(self) -> None:
        """Frees what binding made."""
        self.runs.clear()

    def release(self) -> None:
        """Frees every layer."""
        self.runs.clear()
        self.linears.clear()
        self.drop_weight()
        gc.collect()


def _serve(connection: Connection, name: str, threads: int, log: str) -> None:
    """The loop of a peer's process. What libraries print goes to the file `log`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        peer = importlib.import_module(f"peers.{name}")
        served = _Served(peer, threads)
        connection.send(("ok", (peer.version(), peer.SCHEMES)))
    except Exception as error:  # whatever keeps a library from loading: it is skipped
        connection.send(("unavailable", _one_line(error)))
        return
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = ("ok", getattr(served, command)(*arguments))
        except Exception as error:
            answer = ("unavailable", _one_line(error))
        connection.send(answer)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:160] or "no message"
    return (
        text
        if isinstance(error, UnavailableError | ImportError)
        else f"{type(error).__name__}: {text}"
    )


class Worker:
    """The other end: starts a peer's process and asks it for things."""

    def __init__(self, name: str, threads: int, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(other, name, threads, str(log)), daemon=True
        )
        self.process.start()
        other.close()

    def load(self, timeout: float = 120) -> tuple[str, tuple[Scheme, ...]]:
        """The peer's version and schemes. Raises UnavailableError where it is not installed."""
        return self._answer(timeout)

    def ask(self, command: str, *arguments: object, timeout: float = 900) -> Any:
        """Calls a method of the process's state.

        Raises UnavailableError where the peer cannot do it, and WorkerDiedError where the process
        is gone.
        """
        try:
            self.connection.send((command, arguments))
        except OSError:
            raise WorkerDiedError(self._cause_of_death()) from None
        return self._answer(timeout)

    def stop(self) -> None:
        """Ends the process."""
        self.connection.close()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _answer(self, timeout: float) -> Any:
        try:
            if not self.connection.poll(timeout):
                self.process.kill()
                raise WorkerDiedError(f"no answer within {timeout:.0f} s")
            state, value = self.connection.recv()
        except (EOFError, OSError):
            raise WorkerDiedError(self._cause_of_death()) from None
        if state == "unavailable":
            raise UnavailableError(value)
        return value

    def _cause_of_death(self) -> str:
        self.process.join(timeout=5)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return f"ended with exit status {code}"
