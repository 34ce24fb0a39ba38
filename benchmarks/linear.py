#!/usr/bin/env python3
"""Times Quantal's linear layer beside those of other libraries, on this machine, in one run.

All libraries take turns in every round, so that what changes on the machine meanwhile meets all of
them. Each result is checked against float64 before it is timed. A time is the least of the rounds'
medians. Below 128 tokens so many copies of the weight take turns that it comes from memory, as it
does in a model; from 128 on two do, since arithmetic then takes longer than reading.
"""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import machine
import report
from peers import PEERS
from peers.peer import FAMILIES, Scheme, UnavailableError
from peers.worker import Timing, Worker, WorkerDiedError
from tqdm import tqdm

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]
TOKENS = [1, 4, 16, 128, 512]
QUICK_SHAPES = [(512, 1024)]
QUICK_TOKENS = [1, 16, 128]

MANY_TOKENS = 128  # from here on arithmetic decides, and few copies do
FEW_COPIES = 2
MOST_COPIES = 512
SLOW_SECONDS = 3.0  # a call that takes longer is timed once
WEIGHT_SEED, ACTIVATION_SEED = 1, 2


@dataclass
class Case:
    """A scheme of a peer at one shape."""

    peer: str
    scheme: Scheme
    rows: int
    columns: int
    copies: int
    weight_bytes: int = 0

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.peer}/{self.scheme.name}"

    def copies_for(self, tokens: int) -> int:
        """How many copies take turns under a batch of so many tokens."""
        return self.copies if tokens < MANY_TOKENS else min(self.copies, FEW_COPIES)

    def memory(self) -> float:
        """An estimate of the bytes that it occupies; graphs keep some weights twice."""
        return 1.4 * self.copies * self.rows * self.columns * self.scheme.weight_bits / 8


def shape(text: str) -> tuple[int, int]:
    """Reads ROWSxCOLUMNS."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS, as in 4096x4096, got {text!r}")
    return int(found[1]), int(found[2])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", nargs="+", type=shape, metavar="NxK", help="weights: rows x columns")
    add("--tokens", nargs="+", type=int, metavar="M", help="batches: tokens a call")
    add("--peers", nargs="+", choices=PEERS, default=PEERS, metavar="PEER", help=", ".join(PEERS))
    add("--schemes", default="", metavar="REGEX", help="only PEER/SCHEME that match")
    add("--rounds", type=int, default=5, help="turns of each peer (%(default)s)")
    add("--seconds", type=float, default=0.25, help="length of a turn (%(default)s)")
    add("--threads", type=int, default=2, help="threads of each peer (%(default)s)")
    add(
        "--isa",
        choices=("native", "avx2"),
        default="native",
        help="avx2: hold every library that can be held to AVX2",
    )
    add(
        "--distinct-mib",
        type=int,
        default=256,
        metavar="MIB",
        help="weights that take turns; more than the caches hold (%(default)s)",
    )
    add("--build", type=Path, default=machine.ROOT / "build" / "release", help="build folder")
    add("--output", type=Path, default=machine.ROOT / "build" / "bench-results", help="folder")
    add("--no-limits", action="store_true", help="do not measure the limits of the machine")
    add("--quick", action="store_true", help="a small shape, one short round: to see that it runs")
    add("--list", action="store_true", help="list the schemes that are there and stop")
    given = parser.parse_args()
    given.shapes = given.shapes or (QUICK_SHAPES if given.quick else SHAPES)
    given.tokens = sorted(given.tokens or (QUICK_TOKENS if given.quick else TOKENS))
    if given.quick:
        given.rounds, given.seconds = 1, 0.01
        given.distinct_mib = min(given.distinct_mib, 4)
    return given


class Bench:
    """One run: the peers' processes, what they measured, and what was skipped."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.workers: dict[str, Worker] = {}
        self.schemes: dict[str, tuple[Scheme, ...]] = {}
        self.versions: dict[str, str] = {}
        self.skipped: list[str] = []
        self.results: list[dict[str, Any]] = []
        self.limits: list[dict[str, Any]] = []
        self.progress: tqdm[None] | None = None

    def skip(self, name: str, why: object) -> None:
        """Says that something is left out, and why, once."""
        line = f"{name}: skipped: {why}"
        if line not in self.skipped:
            self.skipped.append(line)
            tqdm.write(line)

    def load_peers(self) -> None:
        """Starts the processes; a peer that is not installed is skipped."""
        logs = self.given.output / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        for peer in self.given.peers:
            worker = Worker(peer, self.given.threads, logs / f"{peer}.log")
            try:
                self.versions[peer], schemes = worker.load()
            except (UnavailableError, WorkerDiedError) as error:
                self.skip(peer, error)
                worker.stop()
                continue
            matches = [s for s in schemes if re.search(self.given.schemes, f"{peer}/{s.name}")]
            self.workers[peer], self.schemes[peer] = worker, tuple(matches)

    def stop(self) -> None:
        """Ends the processes."""
        for worker in self.workers.values():
            worker.stop()
        self.workers.clear()

    def measure_limits(self) -> None:
        """Measures what the machine can do at most, at this moment."""
        program = self.given.build / "benchmarks" / "limits"
        if self.given.no_limits:
            return
        if not program.exists():
            self.skip("limits", "not built: `make build` does that")
            return
        self.limits.append(
            machine.measure_limits(
                program, self.given.threads, self.given.isa, self.given.quick, self.given.output
            )
        )

    def cases(self, rows: int, columns: int) -> list[Case]:
        """Every scheme at a shape, with as many copies as exceed the caches."""
        distinct = self.given.distinct_mib << 20
        many = any(tokens < MANY_TOKENS for tokens in self.given.tokens)
        found = []
        for peer, schemes in self.schemes.items():
            for scheme in schemes:
                size = rows * columns * scheme.weight_bits / 8
                copies = math.ceil(distinct / size) if many else FEW_COPIES
                copies = min(max(copies, FEW_COPIES), MOST_COPIES)
                found.append(Case(peer, scheme, rows, columns, copies))
        return found

    def batches(self, cases: list[Case]) -> Iterator[list[Case]]:
        """Cases whose weights fit in memory together: all, unless memory is short.

        Families, which are compared with each other, stay together as far as they can.
        """
        most = 0.8 * machine.available_memory()
        batch: list[Case] = []
        for case in sorted(cases, key=lambda c: FAMILIES.index(c.scheme.family)):
            if batch and sum(c.memory() for c in [*batch, case]) > most:
                yield batch
                batch = []
            batch.append(case)
        if batch:
            yield batch

    def ask(self, case: Case, command: str, *arguments: object) -> Any:
        """Asks the case's process; None, and a line, where it cannot do it."""
        worker = self.workers.get(case.peer)
        if worker is None:
            return None
        try:
            return worker.ask(command, case.scheme.name, *arguments)
        except UnavailableError as error:
            self.skip(case.name, error)
        except WorkerDiedError as error:
            self.skip(case.peer, f"its process {error} in {command} of {case.scheme.name}")
            self.workers.pop(case.peer).stop()
        return None

    def tell_all(self, command: str) -> None:
        """The same command to every process."""
        for peer, worker in list(self.workers.items()):
            try:
                worker.ask(command)
            except WorkerDiedError as error:
                self.skip(peer, f"its process {error} in {command}")
                self.workers.pop(peer).stop()

    def run(self) -> None:
        """Measures everything."""
        shapes, tokens = self.given.shapes, self.given.tokens
        count = sum(len(schemes) for schemes in self.schemes.values())
        total = len(shapes) * count * (1 + len(tokens) * (1 + self.given.rounds))
        with tqdm(total=total, unit="step", smoothing=0.05) as self.progress:
            for rows, columns in shapes:
                for batch in self.batches(self.cases(rows, columns)):
                    self.run_batch(batch)

    def step(self, text: str, count: int = 1) -> None:
        """Moves the progress bar."""
        assert self.progress is not None
        self.progress.set_description(text)
        self.progress.update(count)

    def run_batch(self, batch: list[Case]) -> None:
        """Measures cases of one shape in turn, under every number of tokens."""
        ready = []
        for case in batch:
            self.step(f"{case.rows}x{case.columns} prepare {case.name}")
            size = self.ask(case, "prepare", case.rows, case.columns, case.copies, WEIGHT_SEED)
            if size is not None:
                case.weight_bytes = size
                ready.append(case)
        left_out = len(batch) - len(ready)
        self.step("", left_out * len(self.given.tokens) * (1 + self.given.rounds))
        self.tell_all("drop_weight")
        for tokens in self.given.tokens:
            self.run_tokens(ready, tokens)
        self.tell_all("release")

    def run_tokens(self, cases: list[Case], tokens: int) -> None:
        """Rounds over cases that are prepared, with activations of so many tokens."""
        errors: dict[str, float] = {}
        timings: dict[str, list[Timing]] = {}
        for case in cases:
            self.step(f"{case.rows}x{case.columns} M={tokens} check {case.name}")
            error = self.ask(case, "bind", tokens, case.copies_for(tokens), ACTIVATION_SEED)
            if error is not None:
                errors[case.name], timings[case.name] = error, []
        for round_number in range(self.given.rounds):
            # Another first case in every round: none always follows the same neighbour's end.
            first = round_number * 7 % max(len(cases), 1)
            for case in cases[first:] + cases[:first]:
                self.step(f"{case.rows}x{case.columns} M={tokens} {case.name}")
                taken = timings.get(case.name)
                if taken is None or (taken and taken[0].median > SLOW_SECONDS):
                    continue
                timing = self.ask(case, "measure", self.given.seconds, SLOW_SECONDS)
                if timing is not None:
                    taken.append(timing)
        for case in cases:
            if timings.get(case.name):
                self.add_result(case, tokens, errors[case.name], timings[case.name])
        self.tell_all("drop_runs")

    def add_result(self, case: Case, tokens: int, error: float, timings: list[Timing]) -> None:
        """Notes what the rounds gave."""
        seconds = min(timing.median for timing in timings)
        self.results.append(
            {
                "peer": case.peer,
                "scheme": case.scheme.name,
                "family": case.scheme.family,
                "rows": case.rows,
                "columns": case.columns,
                "tokens": tokens,
                "ms": seconds * 1e3,
                "gbps": case.weight_bytes / seconds / 1e9,
                "gflops": 2 * tokens * case.rows * case.columns / seconds / 1e9,
                "error": error,
                "weight_bytes": case.weight_bytes,
                "copies": case.copies_for(tokens),
                "held": case.peer not in machine.not_held(self.given.isa),
                "rounds": [asdict(timing) for timing in timings],
            }
        )

    def document(self) -> dict[str, Any]:
        """All of it, as it is written."""
        given = self.given
        return {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine.describe(),
            "settings": {
                "threads": given.threads,
                "isa": given.isa,
                "rounds": given.rounds,
                "seconds": given.seconds,
                "distinct_mib": given.distinct_mib,
                "quick": given.quick,
                "command": " ".join(["benchmarks/linear.py", *sys.argv[1:]]),
            },
            "versions": self.versions,
            "not_held": machine.not_held(given.isa),
            "limits": self.limits,
            "skipped": self.skipped,
            "results": self.results,
        }


def main() -> int:
    """Runs the benchmark; writes JSON, a table and a plot."""
    given = parse_arguments()
    machine.prepare_environment(given.threads, given.isa, given.build)
    given.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(given)
    try:
        bench.load_peers()
        if given.list:
            for peer, schemes in bench.schemes.items():
                for scheme in schemes:
                    print(f"{peer}/{scheme.name}\t{scheme.family}\t{bench.versions[peer]}")
            return 0
        bench.measure_limits()
        bench.run()
        bench.measure_limits()  # again: what has drifted meanwhile?
    finally:
        bench.stop()
    if not bench.results:
        print("nothing was measured", file=sys.stderr)
        return 1
    stem = "linear-quick" if given.quick else f"linear-{given.isa}"
    path = given.output / f"{stem}.json"
    path.write_text(json.dumps(bench.document(), indent=1) + "\n")
    return report.write(path)


if __name__ == "__main__":
    sys.exit(main())
