"""What `onnxprune export-trt` prints: what TensorRT would refuse, shape profiles, commands, and times where they were run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from onnxprune.report.bench import seconds
from onnxprune.report.terminal import escape

FEW = 3  # places that are named unless asked for more


def handover(console: Console, report: Mapping[str, Any], script: str, *, verbose: bool = False) -> None:
    """The report of `onnxprune.trt.export`, for people."""
    kinds, nodes = len(report["operators"]), sum(report["operators"].values())
    console.print(
        f"[bold]{escape(report['model'])}[/]  TensorRT {report['tensorrt']['major']}, precision {report['precision']}"
    )
    console.print(f"operators: {kinds} kinds in {nodes} nodes, against {report['tensorrt']['table']}")
    if all(f["severity"] == "warning" for f in report["findings"]):
        console.print("TensorRT takes all of it, as far as the table tells")
    for finding in report["findings"]:
        console.print(f"{finding['severity']}: {escape(_text(finding, verbose))}")
    for profile in report["profiles"]:
        shapes = [_shape(profile[k]) for k in ("min", "opt", "max")]
        console.print(f"profile of {escape(profile['input'])}: {' to '.join((shapes[0], shapes[2]))}, best at {shapes[1]}")
    if report["external_data"]:
        console.print(f"weights are in {escape(', '.join(report['external_data']))}: keep them beside the model")
    if any(f["severity"] == "refused" for f in report["findings"]):
        return
    if report["run"] is not None:
        _ran(console, report)
        return
    console.print()
    console.print(script.split("\n\n", 1)[1].rstrip(), markup=False, soft_wrap=True)
    console.print()
    console.print("The commands were not run; --run does that where TensorRT is installed.")


def _text(finding: Mapping[str, Any], verbose: bool) -> str:
    places: Sequence[str] = finding["where"] if verbose else finding["where"][:FEW]
    more = len(finding["where"]) - len(places)
    named = ", ".join(places) + (f" and {more} more" if more else "")
    return f"{finding['what']}: {named}" + (f" ({finding['hint']})" if finding["hint"] else "")


def _shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes)) or "a scalar"


def _ran(console: Console, report: Mapping[str, Any]) -> None:
    ran = report["run"]
    console.print(f"built with {escape(ran['trtexec'])}, TensorRT {report['tensorrt']['found'] or 'of unknown version'}")
    for build in ran["builds"]:
        latency, compute = build["latency"], build["compute"]
        times = [
            f"{k} {seconds(v['median'])}" for k, v in (("latency", latency), ("on the GPU", compute)) if v and "median" in v
        ]
        throughput = [f"{build['throughput']:g} inferences/s"] if build["throughput"] else []
        console.print(f"{escape(build['engine'])}: {', '.join([*times, *throughput]) or 'trtexec printed no times'}")
    medians = [b["compute"]["median"] for b in ran["builds"] if b["compute"] and "median" in b["compute"]]
    if len(medians) == 2:
        console.print(f"{medians[1] / medians[0]:.2f} times as fast as the original")
    told = ran["compared"]
    if told["by"] is None:
        console.print(f"outputs were not compared: {escape(told['why'])}")
    elif told["relative_l2"] is None:
        tolerance = report["tolerance"]
        console.print(f"outputs are those of ONNX Runtime within atol {tolerance['atol']:g} and rtol {tolerance['rtol']:g}")
    else:
        console.print(f"outputs differ from ONNX Runtime's CPU provider by {told['relative_l2']:.2g} (relative L2)")
