"""The page of `onnxprune report`: well-formed, closed to the outside, true to the files, readable in a browser."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import numpy as np
import onnx
import pytest
import small

import onnxprune
from onnxprune import cli, pages
from onnxprune.report.web import html as markup
from onnxprune.report.web.html import VOID

MODELS = Path(onnxprune.__file__).parent / "models"
DATA = MODELS / "fashion-mnist.npz"
HOW: dict[str, dict[str, Any]] = {
    "resnet20": {"method": "obs", "samples": 24},
    "vgg8": {"method": "pfp", "recover": "none", "samples": 24},
    "mobilenet": {"method": "l1", "samples": 24},
}
EVIL = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><svg onload=alert(1)>",
    "a&amp;b\x1b[31m\n\u202egnp",
    "'--><b>https://example.org/",
)


class Checker(HTMLParser):
    """Collects what a browser would build; complains about what is not nested as HTML is."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, names)
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID - {"rect", "line", "circle", "polyline", "path"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def closed(page: str) -> Checker:
    """The page, after it was checked that it neither fetches nor runs anything."""
    checked = Checker(page)
    assert not {"script", "img", "iframe", "object", "embed", "base", "form", "b"} & set(checked.tags)
    for tag, name, value in checked.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "srcset", "style", "action"), (tag, name)
        assert name != "href" or (tag, value) == ("link", "data:,"), (tag, value)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in html.unescape(page)
    return checked


def run(command: str) -> int:
    return cli.main(shlex.split(command))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that ship with onnxprune, pruned, with a page of each; a sweep of one, and its page."""
    here = tmp_path_factory.mktemp("pages")
    if not DATA.exists():
        pytest.skip("the models are not in this copy")
    for name, how in HOW.items():
        result = onnxprune.prune(MODELS / f"{name}.onnx", DATA, budget={"macs": 0.6}, **how)
        result.save(here / f"{name}.onnx")
    model = MODELS / "vgg8.onnx"
    assert run(f"sweep {model} --data {DATA} --budgets 0.8,0.5 --method l1 --samples 24 -q -o {here / 'sweep'}") == 0
    (here / "bench.json").write_text(json.dumps(bench()))
    for name in HOW:
        more = f"--sweep {here / 'sweep' / 'sweep.json'} --bench {here / 'bench.json'}" if name == "vgg8" else ""
        assert run(f"report {MODELS / name}.onnx {here / name}.onnx -q {more} -o {here / name}.html") == 0
    return here


def bench() -> dict[str, Any]:
    """What `onnxprune bench --profile --json` prints, as far as the page reads it."""
    models = [{"model": f"some/{m}.onnx", "latency": {"median": s, "low": s, "high": s}} for m, s in (("a", 2e-3), ("b", 9e-4))]
    changes = [{"kind": "Conv 3x3", "before": 2e-3, "after": 5e-4, "excess": 0, "why": ""}]
    changes.append({"kind": "Reorder", "before": 0.0, "after": 4e-4, "excess": 4e-4, "why": "moves <data>"})
    slow = [[{"node": n, "kind": "Conv", "seconds": s}] for n, s in (("conv1", 1e-3), ("conv1_nchwc", 3e-4))]
    profile = [{"model": "a", "nodes": slow[0]}, {"model": "b", "shortfall": changes, "nodes": slow[1]}]
    return {"threads": 2, "providers": ["CPUExecutionProvider"], "batch": 1, "models": models, "profile": profile}


# ------------------------------------------------------------------------------------------------------ without a browser


@pytest.mark.parametrize("name", HOW)
def test_the_page_is_well_formed_and_fetches_nothing(made: Path, name: str) -> None:
    page = (made / f"{name}.html").read_text(encoding="utf-8")
    closed(page)
    assert "http://" not in page and "https://" not in page


@pytest.mark.parametrize("name", HOW)
def test_the_page_tells_what_the_report_and_the_files_hold(made: Path, name: str) -> None:
    report = json.loads((made / f"{name}.onnx.report.json").read_text())
    found = closed((made / f"{name}.html").read_text(encoding="utf-8")).text
    for accuracy in report["validation"]["top1"]:
        assert f"{100 * accuracy:.2f} %" in found.replace("\u00a0", " ")
    for layer in report["layers"]:
        assert layer["name"] in found
        if layer["out"][0] != layer["out"][1]:
            assert f"{layer['out'][0]} → {layer['out'][1]}" in found
    share = 100 * report["pruned"]["macs"] / report["original"]["macs"]
    assert f"{share:.1f} % of the work" in found.replace("\u00a0", " ")
    for title in (
        "Before and after",
        "The network",
        "What is guaranteed",
        "What was left alone",
        "Recovery",
        "How it was made",
    ):
        assert title in found
    for group in report["groups"]:
        if group["frozen"]:
            assert group["reason"] in found
    assert report["digests"]["pruned"] in found


def test_layers_and_sizes_come_from_the_files_themselves(made: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.onnx").write_bytes((made / "vgg8.onnx").read_bytes())
    model = onnx.load(tmp_path / "alone.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "alone.onnx")
    found = closed(pages.html(MODELS / "vgg8.onnx", tmp_path / "alone.onnx")).text
    report = json.loads((made / "vgg8.onnx.report.json").read_text())
    for layer in report["layers"]:
        if layer["out"][0] != layer["out"][1]:
            assert f"{layer['out'][0]} → {layer['out'][1]}" in found
    assert "There is no alone.onnx.report.json" in found and "There is no certificate" in found
    assert "nothing was measured" in found and "Sensitivity" not in found


def test_a_calibration_gives_the_scores_that_an_older_report_lacks(made: Path) -> None:
    report = json.loads((made / "vgg8.onnx.report.json").read_text())
    for group in report["groups"]:
        del group["scores"]
    files = (MODELS / "vgg8.onnx", made / "vgg8.onnx", report)
    assert "Sensitivity" not in pages.html(*files)
    calibration = onnxprune.calibrate(MODELS / "vgg8.onnx", DATA, method="l2")
    assert "Sensitivity" in closed(pages.html(*files, calibration=calibration)).text


def test_the_same_files_give_the_same_page(made: Path) -> None:
    once, again = (
        pages.html(MODELS / "vgg8.onnx", made / "vgg8.onnx", json.loads((made / "vgg8.onnx.report.json").read_text()))
        for _ in range(2)
    )
    assert once == again


def test_certificate_parts_are_all_explained(made: Path) -> None:
    found = closed((made / "vgg8.html").read_text(encoding="utf-8")).text
    told = json.loads((made / "vgg8.onnx.certificate.json").read_text())
    for part in ("population", "calibration", "network", "sampling"):
        assert told[part]["bounds"] in found and told[part]["assumes"] in found
        assert told[part]["applies"] or told[part]["reason"] in found
    assert found.count("does not say") == 4


def test_cuts_that_are_not_exact_are_named(made: Path) -> None:
    report = json.loads((made / "vgg8.onnx.report.json").read_text())
    cut = [g for g in report["groups"] if g["removed"]]
    cut[0] |= {"exact": False, "flaw": "it is rounded to 8 bits"}
    found = closed(pages.html(MODELS / "vgg8.onnx", made / "vgg8.onnx", report)).text
    assert f"not exact: it is rounded to 8 bits ({cut[0]['id']})" in found


@pytest.mark.parametrize("best", [0, 3])
def test_a_training_on_top_is_told_of(made: Path, best: int) -> None:
    """Whether the report is that of the pruning, with the training's, or of the training alone."""
    whole = json.loads((made / "vgg8.onnx.report.json").read_text())
    told = {"epochs": 5, "best": best, "metric": "agreement", "before": 0.5, "after": 0.75, "samples": 1000}
    names = ("onnxprune", "model", "seed", "recover", "digests", "validation", "seconds")
    for report in (whole, {k: whole[k] for k in names} | {"certificate": whole["certificate"]}):
        page = closed(pages.html(MODELS / "vgg8.onnx", made / "vgg8.onnx", {**report, "finetune": told})).text
        assert ("50 % before and 75 % after" in page) == (best > 0) and "1,000 samples" in page
        assert "makes the same file again" not in page
        assert ("This made the file that was then trained" in page) == (report is whole)


def test_sweep_and_bench_are_shown_where_they_are_given(made: Path) -> None:
    with_both = closed((made / "vgg8.html").read_text(encoding="utf-8")).text
    without = closed((made / "resnet20.html").read_text(encoding="utf-8")).text
    assert "vgg8-macs-0.5.onnx" in with_both and "moves <data>" in with_both and "0 µs → 400 µs" in with_both
    assert "conv1 Conv" in with_both and "1 ms → 300 µs" in with_both
    assert "Size against quality" not in without and "latency" not in without


def hostile(here: Path) -> tuple[Path, Path]:
    """A model all of whose names mean harm, and what a pruning made of it, with reports."""
    model = small.chain()
    names = {w.name for w in model.graph.initializer} | {o for n in model.graph.node for o in n.output} - {"scores"}
    new = {name: f"{EVIL[i % len(EVIL)]}{i}" for i, name in enumerate(sorted(names))}
    for node in model.graph.node:
        node.name = EVIL[0] + node.name + EVIL[1]
        node.input[:] = [new.get(x, x) for x in node.input]
        node.output[:] = [new.get(x, x) for x in node.output]
    for weight in model.graph.initializer:
        weight.name = new[weight.name]
    del model.graph.value_info[:]
    before = here / "<img src=x>&.onnx"
    onnx.save(model, before)
    np.savez(here / "d.npz", x=small.images(16), y=np.arange(16) % 10)
    after = here / "'\"><script>.onnx"
    command = ["prune", str(before), "--data", str(here / "d.npz"), "--macs", "0.5", "-q", "-o", str(after)]
    assert cli.main(command) == 0
    return before, after


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("evil")
    before, after = hostile(here)
    assert cli.main(["report", str(before), str(after), "-q", "-o", str(here / "evil.html")]) == 0
    return here / "evil.html"


def test_the_page_says_when_nothing_was_held_out(made: Path, evil: Path) -> None:
    said = "the very ones that the choice was made on"
    assert said in closed(evil.read_text(encoding="utf-8")).text
    assert said not in closed((made / "vgg8.html").read_text(encoding="utf-8")).text


def test_names_in_files_stay_text(evil: Path) -> None:
    page = evil.read_text(encoding="utf-8")
    found = closed(page)
    assert "<script>alert(1)</script>" in found.text and "<img src=x>&.onnx" in found.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page)


@pytest.mark.parametrize("name", EVIL)
def test_text_and_attributes_are_escaped(name: str) -> None:
    made = markup.document(name, markup.tag("p", name, title=name, class_=name))
    found = Checker(made)
    assert set(found.tags) == {"html", "head", "meta", "title", "link", "style", "body", "main", "p"}
    assert "\n" not in markup.tag("p", name, title=name)


def test_colours_have_enough_contrast() -> None:
    style = Path(markup.__file__).with_name("page.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in re.findall(r":root \{(.*?)\}", style, re.S))
    for colours in (light, dark):
        for ink, ground in (("ink", "ground"), ("muted", "ground"), ("muted", "soft"), ("after", "ground"), ("ink", "soft")):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        assert contrast(colours["warn"], colours["warn-ground"]) >= 4.5


def contrast(a: str, b: str) -> float:
    """That of WCAG 2, 1 to 21."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# What is typed after `report ORIGINAL PRUNED`, the exit code, and what the one line must say.
REFUSED = {
    "report of another pruning": (
        "{m}/vgg8.onnx {h}/vgg8.onnx --report {h}/resnet20.onnx.report.json",
        3,
        "copies of the cert",
    ),
    "another original": ("{m}/resnet20.onnx {h}/vgg8.onnx", 3, "another original model"),
    "another pruned": ("{m}/vgg8.onnx {h}/resnet20.onnx --report {h}/sweep/vgg8-macs-0.5.onnx.report.json", 3, "copies"),
    "no report there": ("{m}/vgg8.onnx {h}/vgg8.onnx --report {h}/no.json", 2, "no.json"),
    "sweep of another model": ("{m}/resnet20.onnx {h}/resnet20.onnx --sweep {h}/sweep/sweep.json", 2, "another original"),
    "sweep that is none": ("{m}/vgg8.onnx {h}/vgg8.onnx --sweep {h}/bench.json", 2, "onnxprune sweep"),
    "bench that is none": ("{m}/vgg8.onnx {h}/vgg8.onnx --bench {h}/sweep/sweep.json", 2, "bench --json"),
    "bench that is a picture": ("{m}/vgg8.onnx {h}/vgg8.onnx --bench {m}/vgg8.onnx", 2, "bench --json"),
    "output is an input": ("{m}/vgg8.onnx {h}/vgg8.onnx --force -o {h}/vgg8.onnx.report.json", 2, "is an input"),
    "output is there": ("{m}/vgg8.onnx {h}/vgg8.onnx -o {h}/vgg8.html", 2, "--force"),
    "model missing": ("{m}/no.onnx {h}/vgg8.onnx", 2, "no such model"),
}


@pytest.mark.parametrize(("typed", "code", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], typed: str, code: int, words: str) -> None:
    before = sorted(p.name for p in made.iterdir())
    more = "" if "-o" in typed.split() else f" -o {tmp_path / 'new.html'}"
    assert run("report " + typed.format(m=MODELS, h=made) + more) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err, err
    assert not list(tmp_path.iterdir()) and sorted(p.name for p in made.iterdir()) == before


def test_json_that_was_damaged_is_refused_in_one_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((made / "vgg8.onnx.report.json").read_text())
    for number, key in enumerate(("validation", "recovery", "calibration", "seconds", "budget", "groups")):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({**report, key: 3}))
        typed = f"report {MODELS / 'vgg8.onnx'} {made / 'vgg8.onnx'} --report {path} -o {tmp_path / 'new.html'}"
        assert run(typed) == 2, key
        _, err = capsys.readouterr()
        assert "not as onnxprune writes" in err and err.count("\n") == 1
    assert not (tmp_path / "new.html").exists()


# ---------------------------------------------------------------------------------------------------------- in a browser

LOOK = """(() => {
  document.querySelectorAll('details').forEach(d => { d.open = true });
  const boxes = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode;
    if (!node.data.trim() || node.parentElement.closest('title')) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const r of range.getClientRects()) if (r.width && r.height) boxes.push([r.left, r.top, r.right, r.bottom, node.data]);
  }
  const clash = [];
  for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
    const a = boxes[i], b = boxes[j];
    const w = Math.min(a[2], b[2]) - Math.max(a[0], b[0]), h = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
    if (w > 2 && h > 6) clash.push([a[4], b[4]]);
  }
  const size = e => parseFloat(getComputedStyle(e).fontSize);
  return {width: document.documentElement.scrollWidth, boxes: boxes.length, clash,
          small: [...document.querySelectorAll('td,th,p,li,dd')].filter(e => size(e) < 12).length,
          active: document.querySelectorAll('script, img, iframe').length,
          ground: getComputedStyle(document.body).backgroundColor};
})()"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    if browser.executable() is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium), or name one in $ONNXPRUNE_CHROMIUM")
    with browser.browser() as opened:
        yield opened


def look(chromium: browser.Browser, page: Path, width: int, dark: bool) -> dict[str, Any]:
    visit = chromium.visit(page, width, dark=dark, script=LOOK)
    assert visit.errors == []
    assert visit.requests == [page.resolve().as_uri()]
    found: dict[str, Any] = visit.found
    assert found["width"] <= width and found["clash"] == [] and found["small"] == 0 and found["active"] == 0
    return found


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", [*HOW, "sweep/sweep"])
def test_a_browser_shows_the_page(made: Path, chromium: browser.Browser, name: str, width: int) -> None:
    light, dark = (look(chromium, made / f"{name}.html", width, mode) for mode in (False, True))
    assert light["boxes"] == dark["boxes"] > 20
    assert light["ground"] == "rgb(255, 255, 255)" != dark["ground"]


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_hostile_names_as_text(evil: Path, chromium: browser.Browser, width: int) -> None:
    look(chromium, evil, width, False)
