"""What people read: tables that fit, progress with its rate, JSON alone on request, nothing that acts on a terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import small
from rich.cells import cell_len
from rich.console import Console

import onnxprune
from onnxprune import cli
from onnxprune.report import progress as reporting
from onnxprune.report import terminal
from onnxprune.report.progress import Log, duration, rate
from onnxprune.report.words import visible

PRUNE = "prune m.onnx --data d.npz --macs 0.5"
PROGRAM = [sys.executable, "-m", "onnxprune"]
CLEAN = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE")}
ENVIRONMENT = {**CLEAN, "PYTHONPATH": str(Path(onnxprune.__file__).parents[1]), "TERM": "xterm-256color"}
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, samples, a pruned model, a calibration and a plan."""
    here = tmp_path_factory.mktemp("given")
    onnx.save(small.chain(), here / "m.onnx")
    np.savez(here / "d.npz", x=small.images(16), y=np.arange(16) % 10)
    command = f"prune {here}/m.onnx --method l1 --macs 0.5 -q -o {here}/p.onnx --save-plan {here}/plan.json"
    assert cli.main(shlex.split(command)) == 0
    onnxprune.calibrate(small.chain(), small.images(16)).save(here / "c.calib")
    return here


# ---------------------------------------------------------------------------------------------------------------- --json

EVERY = {
    "prune": ("prune m.onnx --data d.npz --macs 0.5 -o {t}/a.onnx", {"model", "budget", "layers", "validation", "command"}),
    "prune quietly": ("prune m.onnx --method l1 --macs 0.5 -q -o {t}/a.onnx", {"model", "budget"}),
    "inspect": ("inspect m.onnx", {"model", "macs", "groups"}),
    "verify": ("verify m.onnx p.onnx", {"validation", "certificate"}),
    "apply": ("apply m.onnx plan.json -o {t}/a.onnx", {"out", "original", "pruned"}),
    "calibrate": ("calibrate m.onnx --data d.npz -o {t}/c", {"out", "criterion", "samples"}),
    "merge": ("merge c.calib c.calib -o {t}/c", {"out", "samples", "parts"}),
    "sweep": ("sweep m.onnx --method l1 --budgets 0.8,0.5 -o {t}/s", {"points", "kind", "original"}),
    "report": ("report m.onnx p.onnx -o {t}/p.html", {"out", "bytes"}),
    "demo": ("demo vgg8 --macs 0.9 -o {t}/v.onnx", {"model", "budget"}),
}


@pytest.mark.parametrize(("command", "keys"), EVERY.values(), ids=EVERY.keys())
def test_json_is_one_object_and_nothing_else(
    given: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    keys: set[str],
) -> None:
    monkeypatch.chdir(given)
    capsys.readouterr()
    assert cli.main([*shlex.split(command.format(t=tmp_path)), "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert isinstance(found, dict) and keys <= found.keys() and out.isascii()


def test_the_report_holds_the_command_that_makes_it_again(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(given)
    (tmp_path / "o.toml").write_text('align = 2\nfreeze = ["Conv_0"]\nmean = [0.1, 0.2, 0.3]')
    first = f"prune m.onnx --method l1 --params 0.6 -q --debug --config {tmp_path}/o.toml -o {tmp_path}/a.onnx"
    assert cli.main(shlex.split(first)) == 0
    report = json.loads((tmp_path / "a.onnx.report.json").read_text())
    words = report["command"]
    assert words[:3] == ["onnxprune", "prune", "m.onnx"] and not {"-q", "--debug", "--config"} & set(words)
    assert words[words.index("--mean") : words.index("--mean") + 4] == ["--mean", "0.1", "0.2", "0.3"]
    again = [w if w != f"{tmp_path}/a.onnx" else f"{tmp_path}/b.onnx" for w in words[1:]]
    assert cli.main([*again, "-q"]) == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert report["options"]["align"] == 2 and report["inputs"] == {"x": [1, 3, 8, 8]}


# ---------------------------------------------------------------------------------------------------- terminals and pipes


def on_terminal(command: Sequence[str], columns: int, cwd: Path, **environment: str) -> str:
    """What a program writes on a terminal of so many columns."""
    child, screen = pty.fork()
    if child == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        os.chdir(cwd)
        os.execvpe(command[0], list(command), {**ENVIRONMENT, **environment})
    parts = []
    while True:
        try:
            part = os.read(screen, 65536)
        except OSError:
            break
        if not part:
            break
        parts.append(part)
    os.close(screen)
    _, status = os.waitpid(child, 0)
    text = b"".join(parts).decode()
    assert os.waitstatus_to_exitcode(status) == 0, text
    return text


def shown(text: str) -> list[str]:
    """The lines of a terminal's text, without what is not seen."""
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).rstrip() for line in re.split(r"[\r\n]+", text)]


def test_tables_fit_a_terminal_of_eighty_columns(given: Path, tmp_path: Path) -> None:
    text = on_terminal(
        [*PROGRAM, "prune", "m.onnx", "--data", "d.npz", "--macs", "0.5", "-o", str(tmp_path / "a.onnx")], 80, given
    )
    lines = shown(text)
    assert max(map(cell_len, lines)) <= 80
    head = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    assert [line.split()[0] for line in lines[head + 1 : head + 5]] == ["Conv_0", "Conv_3", "Conv_6", "Gemm_11"]
    assert COLOUR.search(text) and "/s" in text  # bars, with rates


def test_no_color_is_respected(given: Path, tmp_path: Path) -> None:
    command = [*PROGRAM, *shlex.split(f"{PRUNE} -o {tmp_path}/a.onnx")]
    assert not COLOUR.search(on_terminal(command, 80, given, NO_COLOR="1"))


def test_a_dumb_terminal_gets_plain_lines(given: Path, tmp_path: Path) -> None:
    command = [*PROGRAM, "calibrate", "m.onnx", "--data", "d.npz", "-o", str(tmp_path / "c")]
    text = on_terminal(command, 80, given, TERM="dumb")
    assert "calibrating: 16/16" in text and "\x1b" not in text


@pytest.mark.parametrize("command", ["inspect m.onnx", PRUNE + " -o {t}/a.onnx", "inspect m.onnx -v"])
def test_a_pipe_gets_plain_text_whatever_the_environment_says(given: Path, tmp_path: Path, command: str) -> None:
    words = [*PROGRAM, *shlex.split(command.format(t=tmp_path))]
    done = subprocess.run(words, cwd=given, env={**ENVIRONMENT, "FORCE_COLOR": "1"}, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout and not re.search(r"[\x00-\x08\x0b-\x1f]", done.stdout + done.stderr)


def test_names_cannot_act_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small.chain()
    for node in model.graph.node:
        node.name = f"\x1b[2J\x07{node.name}\n\u202e"
    onnx.save(model, tmp_path / "m.onnx")
    capsys.readouterr()
    assert cli.main(shlex.split(f"prune {tmp_path}/m.onnx --method l1 --macs 0.5 -o {tmp_path}/a.onnx -v")) == 0
    assert cli.main(shlex.split(f"inspect {tmp_path}/m.onnx -v")) == 0
    out, err = capsys.readouterr()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", out + err) and "\\x1b[2J" in out
    assert cli.main(["inspect", str(tmp_path / "no\x1b[2J\n.onnx")]) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and "\x1b" not in err and "no\\x1b[2J .onnx" in err


def test_visible_changes_nothing_but_what_acts() -> None:
    assert visible("/net/Größe 漢字 \\x [b] é") == "/net/Größe 漢字 \\x [b] é"
    assert visible("a\x00\x1b\n\r\t\x7f\x9b\u2028\u202e\u2066\udc80") == r"a\x00\x1b\n\r\t\x7f\x9b\u2028\u202e\u2066\udc80"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("name", ["Conv_1", "/very/long/" + "scope/" * 20 + "Conv_1", "漢字の名前" * 12, "[bold]x[/]"])
def test_a_table_is_never_wider_than_the_terminal(width: int, name: str) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, soft_wrap=True)
    rows = [(name, "1024 -> 512", "1024 -> 512", "1.23 G", "617 M", "50.2 %", "1234.00", "1.23e+03")]
    terminal.table(console, ("layer", "in", "out", "MACs", "after", "kept", "sens.", "epsilon"), rows)
    lines = [line for line in out.getvalue().splitlines() if line]
    assert len(lines) == 2 and all(cell_len(line) <= width for line in lines)
    assert "1024 -> 512" in lines[1] and lines[1].lstrip("…")[:1] in name
    assert width < 120 or "epsilon" in lines[0]


# -------------------------------------------------------------------------------------------------------------- progress


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log() -> tuple[Log, Time, list[str]]:
    lines: list[str] = []
    clock = Time()
    return Log(lines.append, clock), clock, lines


Logged = tuple[Log, Time, list[str]]


def step(log: Log, clock: Time, seconds: float, calls: Sequence[tuple[str, int, int]]) -> None:
    for stage, done, total in calls:
        log(stage, done, total)
        clock.now += seconds


def test_a_log_tells_rate_and_time_left(log: Logged) -> None:
    step(log[0], log[1], 2.0, [("calibrate", i, 10) for i in range(11)])
    assert log[2] == ["calibrating: 0/10", "calibrating: 5/10 (0.5/s, 10 s left)", "calibrating: 10/10 in 20 s"]


def test_slow_work_gets_a_line_every_half_minute(log: Logged) -> None:
    step(log[0], log[1], 20.0, [("recover", i, 100) for i in range(6)])
    assert log[2] == [
        "recovering layers: 0/100",
        "recovering layers: 2/100 (3/min, 32 min 40 s left)",
        "recovering layers: 4/100 (3/min, 32 min 0 s left)",
    ]


def test_a_stage_that_begins_again_is_timed_again(log: Logged) -> None:
    for _ in range(2):
        step(log[0], log[1], 5.0, [("validate", i, 2) for i in range(3)])
    assert (
        log[2] == ["comparing outputs: 0/2", "comparing outputs: 1/2 (0.2/s, 5 s left)", "comparing outputs: 2/2 in 10 s"] * 2
    )


def test_times_and_rates_in_words() -> None:
    assert [duration(s) for s in (0.4, 59.4, 60, 93.4, 3600, 7384)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "1 min 33 s",
        "1 h 0 min",
        "2 h 3 min",
    ]
    assert [rate(s) for s in (1234.5, 3.14159, 0.05)] == ["1.23e+03/s", "3.14/s", "3/min"]


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_is_silent(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    tell: Callable[[str, int, int], None]
    with reporting.progress(quiet) as tell:
        tell("calibrate", 1, 1)
    assert capsys.readouterr().err == ("" if quiet else "calibrating: 1/1\n")
