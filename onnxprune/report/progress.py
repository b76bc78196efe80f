"""How far long work has come: bars with rate and time left on a terminal, plain lines in a log, nothing when quiet."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

Tell: TypeAlias = Callable[[str, int, int], None]
"""tell(stage, done, total)."""

STAGES = {
    "compile": "compiling once",
    "calibrate": "calibrating",
    "eliminate": "eliminating channels",
    "recover": "recovering layers",
    "tune": "tuning weights",
    "search": "certifying networks",
    "sweep": "making networks",
    "validate": "comparing outputs",
    "read": "reading samples",
    "finetune": "training",
    "load": "reading models",
    "memory": "measuring memory",
    "time": "timing",
    "costs": "timing layers",
    "trials": "timing networks",
    "influence": "weighing layers",
}
SILENCE = 30.0  # seconds after which a log gets a line, however little was done


@contextmanager
def progress(quiet: bool) -> Iterator[Tell]:
    """Yields tell(stage, done, total), which shows it on standard error. A stage may begin again."""
    if quiet:
        yield lambda stage, done, total: None
    elif sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        with _bars() as bars:
            yield _on_terminal(bars)
    else:
        yield Log(lambda line: print(line, file=sys.stderr, flush=True))


def _on_terminal(bars: Progress) -> Tell:
    tasks: dict[str, TaskID] = {"": bars.add_task("analysing", total=None)}  # until a stage says how far it is

    def tell(stage: str, done: int, total: int) -> None:
        if "" in tasks:
            bars.remove_task(tasks.pop(""))
        if stage in tasks and done < bars.tasks[bars.task_ids.index(tasks[stage])].completed:
            bars.reset(tasks[stage], total=total)  # so that rates are those of this round
        if stage not in tasks:
            tasks[stage] = bars.add_task(STAGES.get(stage, stage), total=total)
        bars.update(tasks[stage], completed=done)

    return tell


def _bars() -> Progress:
    columns = (TextColumn("{task.description:>20}"), BarColumn(20), _Count(), _Rate(), _Left())
    return Progress(*columns, console=Console(stderr=True), transient=True)


class _Count(MofNCompleteColumn):
    """How many of how many, where that is known."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class _Rate(ProgressColumn):
    """How many are done per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{rate(speed):>8}" if speed else "", style="progress.data.speed")


class _Left(ProgressColumn):
    """The time that is left, or, where nobody knows, the time that it has taken."""

    def render(self, task: Task) -> Text:
        if task.total is None or task.finished:
            return Text(duration(task.elapsed or 0), style="progress.elapsed")
        return Text("" if task.time_remaining is None else f"{duration(task.time_remaining)} left", style="progress.remaining")


def rate(speed: float) -> str:
    """3.14159 a second -> "3.14/s"; less than one every ten seconds is counted by the minute."""
    return f"{speed:.3g}/s" if speed >= 0.1 else f"{60 * speed:.2g}/min"


def duration(seconds: float) -> str:
    """93.4 -> "1 min 33 s"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Log:
    """Plain lines: at the start, half-way and the end of a stage, and where there has been none for half a minute."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._tenth: dict[str, int] = {}
        self._began: dict[str, float] = {}
        self._last = clock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """A line where one is due."""
        now, tenth = self._clock(), 10 * done // max(1, total)
        if tenth < self._tenth.get(stage, -1) or stage not in self._began:
            self._began[stage] = now
            self._tenth.pop(stage, None)
        due = self._tenth.get(stage) != tenth and (done == total or tenth % 5 == 0)
        if due or (done < total and now - self._last >= SILENCE):
            self._tenth[stage], self._last = tenth, now
            self._write(f"{STAGES.get(stage, stage)}: {done}/{total}{self._pace(done, total, now - self._began[stage])}")

    @staticmethod
    def _pace(done: int, total: int, seconds: float) -> str:
        if not done or seconds < 1:
            return ""
        if done >= total:
            return f" in {duration(seconds)}"
        return f" ({rate(done / seconds)}, {duration(seconds * (total - done) / done)} left)"
