#!/usr/bin/env python3
"""Prune random operator graphs, each by several random plans, and hold every result against the masked original.

    python tools/fuzz.py --minutes 10 --seed 0 [--jobs 1] [--save FOLDER] [--json FILE]
    python tools/fuzz.py --one GRAPH_SEED [--save FOLDER]

Wrong is: an error or exception, a pruned model that fails to load or run, that the checker refuses, that changes an
output's shape or type, that differs from the masked original by more than 1e-4 of an output's range (1e-2 where tensors
are in half precision, 5e-2 where groups are flagged as rounding to 8 bits), or whose size is not the predicted one. Of
cuts that --allow-approximate makes only the values may differ. Every graph follows from its number alone, as long as the
makers of operators stay what they are. A finding is made small; --save writes it as FOLDER/SEED.onnx with its inputs and
a note. Exit code 1 when anything was found.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fuzzing import report, table
from fuzzing.check import Finding, Outcome, examine
from fuzzing.graphs import make
from fuzzing.shrink import shrink, store

PER_SEED = 1_000_000  # graphs of run number --seed start at this many times it
PATIENCE = 120.0  # seconds for one graph


@dataclass(frozen=True)
class Settings:
    """Where to put what is found, and which operators to favour."""

    save: Path | None = None
    around: tuple[str, ...] = ()


def attend(pipe: Connection, settings: Settings) -> None:
    """Works on the graphs whose numbers come through the pipe; sends back (stage, what is known)."""
    while (seed := pipe.recv()) is not None:
        pipe.send(("making", None))
        pipe.send(("done", try_one(seed, settings, lambda stage: pipe.send((stage, None)))))


def try_one(seed: int, settings: Settings, tell: Any = lambda stage: None) -> Outcome:
    """Makes and examines one graph; what is found wrong is made small and saved."""
    case = make(seed, settings.around)
    if case is None:
        return Outcome("discarded", "nothing came of it")
    made = examine(case, tell)
    made.story = case.story
    made.refused = case.refused
    if made.findings and settings.save is not None:
        tell("shrinking")
        store(settings.save, shrink(case, made.findings[0].kind), made)
    return made


class Worker:
    """A process that may be lost to a crash of ONNX Runtime, which then says something about the graph it was on."""

    def __init__(self, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=attend, args=(other, settings), daemon=True)
        self.process.start()
        other.close()
        self.seed: int | None = None
        self.stage = ""
        self.since = 0.0

    def give(self, seed: int) -> None:
        self.seed, self.stage, self.since = seed, "making", time.monotonic()
        self.pipe.send(seed)

    def take(self) -> Outcome | None:
        """What came of the graph; None as long as nothing has."""
        try:
            while self.pipe.poll():
                self.stage, made = self.pipe.recv()
                if made is not None:
                    return made  # type: ignore[no-any-return]
        except (EOFError, OSError):
            return self._lost(f"the process ended while it worked on '{self.stage}'")
        if time.monotonic() - self.since > PATIENCE:
            self.process.kill()
            return self._lost(f"no end after {PATIENCE:.0f} s of '{self.stage}'")
        return None

    def _lost(self, text: str) -> Outcome:
        self.process.join(5)
        if self.stage in ("making", "original"):
            return Outcome("discarded", f"ONNX Runtime crashes on the original: {text}")
        return Outcome("wrong", findings=[Finding("crash", self.stage, text)])

    def stop(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join(5)


def campaign(first: int, minutes: float, graphs: int | None, jobs: int, settings: Settings) -> report.Tally:
    """Works through graph numbers from `first` until the time is over or `graphs` are done."""
    tally = report.Tally()
    end = time.monotonic() + 60 * minutes
    workers = [Worker(settings) for _ in range(jobs)]
    following = first
    for worker in workers:
        worker.give(following)
        following += 1
    while workers:
        wait([w.pipe for w in workers], timeout=1.0)
        for i, worker in enumerate(list(workers)):
            made = worker.take()
            if made is None:
                continue
            assert worker.seed is not None
            tally.add(worker.seed, made)
            if not worker.process.is_alive():
                workers[i] = worker = Worker(settings)  # noqa: PLW2901
            over = time.monotonic() > end or (graphs is not None and following >= first + graphs)
            if over:
                worker.stop()
                workers[i] = None  # type: ignore[call-overload]
            else:
                worker.give(following)
                following += 1
        workers = [w for w in workers if w is not None]
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--graphs", type=int, help="stop after this many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--one", type=int, metavar="GRAPH_SEED", help="try this graph alone, in this process")
    parser.add_argument("--around", nargs="+", default=[], metavar="OPERATOR", help="put these operators in often")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if table.missing():
        names = ", ".join(f"{domain or 'ai.onnx'}::{op}" for domain, op in table.missing())
        print(f"not fuzzed, though there is a rule for them: {names}", flush=True)
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
    settings = Settings(args.save, tuple(args.around))
    start = time.monotonic()
    if args.one is not None:
        tally = report.Tally()
        tally.add(args.one, try_one(args.one, settings))
    else:
        tally = campaign(args.seed * PER_SEED, args.minutes, args.graphs, args.jobs, settings)
    print(tally.summary(time.monotonic() - start))
    if args.json:
        args.json.write_text(json.dumps(tally.to_json(), indent=1) + "\n")
    return int(bool(tally.findings))


if __name__ == "__main__":
    sys.exit(main())
