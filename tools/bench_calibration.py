#!/usr/bin/env python3
"""Time and memory of the calibration beside plain ONNX Runtime inference of the same images, in one run.

    python tools/bench_calibration.py [--nets resnet20 ...] [--modes exact bound max] [--images 64] [--threads 2]
    python tools/bench_calibration.py --model resnet20=FILE.onnx --data cifar10-test.zip --mean 0.485 0.456 0.406 --std ...
    python tools/bench_calibration.py --whole 128 --nets resnet50     # one calibration from the file on, seconds
    python tools/bench_calibration.py --rest 32 --nets resnet50       # the rest of prune, with 32 validation images
    python tools/bench_calibration.py --stream 1000 10000 50000 --nets resnet20 --modes bound  # memory by number of images

The networks have random weights unless --model names a file for one, the images are smoothed noise unless --data is given.
Inference and calibration have the same batches, threads and provider and take turns; the medians of --repeats rounds
count, after one round to warm up. `ratio` is of wall-clock seconds; `CPU` of processor seconds with one thread, which other
load on the machine hardly disturbs. Compiling is measured apart, in an empty cache. Peak memory is the largest resident set
(VmHWM of Linux) of a process that only runs the model, or only calibrates.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

MIB = 1 << 20
MODES: dict[str, dict[str, str]] = {"exact": {}, "bound": {"mode": "bound"}, "max": {"reduce": "max"}}
LIMITS = {"exact": 25, "bound": 8, "max": 50}


def path_of(args: argparse.Namespace, net: str) -> str:
    return dict(m.split("=", 1) for m in args.model)[net]


def images(spec: Any, args: argparse.Namespace, count: int) -> Any:
    """[count, C, H, W]: from --data, else noise that is smooth at several scales."""
    from onnxprune.data import ImageOptions, open_data

    size = next(d for d in (spec.shape[2], args.size) if d)
    if args.data:
        options = ImageOptions(size=(size, size), mean=tuple(args.mean), std=tuple(args.std))
        found = open_data(args.data, [spec], options)
        return found.batch(np.arange(count) * (len(found) // count))[spec.name]
    channels = spec.shape[1] or 3
    rng, x = np.random.default_rng(0), np.zeros((count, channels, size, size), np.float32)
    for cells in (4, 8, 32):
        noise = rng.standard_normal((count, channels, cells, cells), np.float32)
        x += noise.repeat(-(-size // cells), axis=2).repeat(-(-size // cells), axis=3)[:, :, :size, :size]
    return x


class Images:
    """What `calibrate` reads; image i is the i-th of a few that come again and again."""

    def __init__(self, name: str, x: Any, count: int) -> None:
        self.name, self.x, self.count = name, x, count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Any) -> dict[str, Any]:
        return {self.name: self.x[np.asarray(indices) % len(self.x)]}

    def digest(self, indices: Any) -> str:
        return f"{len(indices)} images"


def prepared(args: argparse.Namespace, net: str, count: int) -> tuple[Any, Images, int]:
    """(the imported model, the images, the batch that calibration chooses)."""
    from onnxprune.contraction import consumers
    from onnxprune.imported import load
    from onnxprune.passes.calibrate import batch_size

    imported = load(path_of(args, net))
    (spec,) = imported.specs
    tensors = list(dict.fromkeys(layer.x.tensor for layer in consumers(imported.groups)))
    data = Images(spec.name, images(spec, args, min(count, 256)), count)
    return imported, data, batch_size(imported.groups, tensors, args.batch)


def infer(session: Any, data: Images, batch: int) -> None:
    for start in range(0, len(data), batch):
        session.run(None, data.batch(np.arange(start, min(start + batch, len(data)))))


def speed(args: argparse.Namespace, net: str) -> dict[str, Any]:
    """Medians of seconds, by the clock and of the processor, of inference and of every mode."""
    from onnxprune import runtime
    from onnxprune.criteria import Sensitivity
    from onnxprune.passes.calibrate import calibrate

    imported, data, batch = prepared(args, net, args.images)
    groups = imported.groups
    session = runtime.session(groups.net.source)
    works = {"inference": lambda: infer(session, data, batch)}
    for mode in args.modes:
        works[mode] = lambda mode=mode: calibrate(groups, Sensitivity(**MODES[mode]), data, batch=batch)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for again in range(args.repeats + 1):
        for name, work in works.items():
            clock, cpu = time.perf_counter(), time.process_time()
            work()
            if again:
                taken[name].append((time.perf_counter() - clock, time.process_time() - cpu))
    found = {n: [statistics.median(t[i] for t in ts) for i in (0, 1)] for n, ts in taken.items()}
    return {"seconds": found, "batch": batch}


def peak(args: argparse.Namespace, net: str, work: str) -> dict[str, Any]:
    """Peak memory of a process that does one kind of work."""
    if work == "inference":  # no more than anybody needs who runs the model
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = args.threads
        session = ort.InferenceSession(path_of(args, net), options, providers=["CPUExecutionProvider"])
        value = session.get_inputs()[0]
        size = value.shape[2] if isinstance(value.shape[2], int) else args.size
        channels = value.shape[1] if isinstance(value.shape[1], int) else 3
        x = np.random.default_rng(0).standard_normal((args.images, channels, size, size), np.float32)
        infer(session, Images(value.name, x, args.images), args.batch)
    else:
        from onnxprune.criteria import Sensitivity
        from onnxprune.passes.calibrate import calibrate

        imported, data, _ = prepared(args, net, args.images)
        calibrate(imported.groups, Sensitivity(**MODES[work]), data, batch=args.batch)
    return {"peak": largest_resident()}


class Generated(Images):
    """Images of smoothed noise, each another one, made when they are asked for."""

    def batch(self, indices: Any) -> dict[str, Any]:
        _, channels, size, _ = self.x.shape
        cells = [np.random.default_rng(int(i)).standard_normal((channels, 8, 8), np.float32) for i in indices]
        times = -(-size // 8)
        return {self.name: np.stack(cells).repeat(times, axis=2).repeat(times, axis=3)[:, :, :size, :size]}


def streamed(args: argparse.Namespace, net: str, count: int) -> dict[str, Any]:
    """Calibrates on `count` images, those of --data or generated ones, read when they are needed; peak memory and seconds."""
    from onnxprune.criteria import Sensitivity
    from onnxprune.data import ImageOptions, open_data
    from onnxprune.passes.calibrate import calibrate

    imported, few, batch = prepared(args, net, 1)
    data: Any = Generated(few.name, few.x, count)
    if args.data:
        size = few.x.shape[2]
        data = open_data(args.data, imported.specs, ImageOptions(size=(size, size), mean=tuple(args.mean), std=tuple(args.std)))
    half: list[float] = []

    def tell(done: int, total: int) -> None:
        if not half and done >= total // 2:
            half.append(resident())

    clock, cpu = time.perf_counter(), time.process_time()
    calibrate(imported.groups, Sensitivity(**MODES[args.modes[0]]), data, np.arange(count), batch=batch, progress=tell)
    seconds = {"clock": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
    return {"peak": largest_resident(), "half": half[0], "end": resident(), **seconds}


def stream(args: argparse.Namespace, net: str) -> None:
    """A table of the memory that processes need which calibrate on as many images as asked for."""
    print(f"{net}, {args.modes[0]}, {args.data or 'generated images'}\n")
    print("| images | resident half way, MiB | at the end | peak MiB | seconds | of the processor |\n" + "| --- " * 6 + "|")
    for count in args.stream:
        found = asked(args, net, f"stream{count}", args.threads, args.batch)
        memory = " | ".join(f"{found[k]:.0f}" for k in ("half", "end", "peak"))
        print(f"| {count} | {memory} | {found['clock']:.0f} | {found['cpu']:.0f} |", flush=True)


def resident(field: str = "VmRSS") -> float:
    """MiB of this process in memory now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def largest_resident() -> float:
    """The most so far; `ru_maxrss` would include what the process had that started this one."""
    return resident("VmHWM")


def whole(args: argparse.Namespace, net: str) -> None:
    """Seconds of one `onnxprune calibrate` of --whole images, in a process of its own that is started for it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from onnxprune.imported import load

        (spec,) = load(path_of(args, net)).specs
        np.save(folder / "x.npy", images(spec, args, args.whole))
        model = str(Path(path_of(args, net)).resolve())
        command = [sys.executable, "-m", "onnxprune", "calibrate", model, "--data", "x.npy", "-o", "c", "-q"]
        start = time.perf_counter()
        subprocess.run([*command, "--samples", str(args.whole)], cwd=folder, check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu, most = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / MIB
        seconds = time.perf_counter() - start
        print(f"{net}, {args.whole} images, {args.threads} threads: {seconds:.1f} s, {cpu:.1f} s of processors, {most:.0f} MiB")


def rest(args: argparse.Namespace, net: str) -> None:
    """Seconds of every stage of `onnxprune prune --recover none` but the calibration, with --rest validation images."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from onnxprune.imported import load

        (spec,) = load(path_of(args, net)).specs
        every = images(spec, args, args.rest + 8)
        np.save(folder / "few.npy", every[:8])
        np.save(folder / "held.npy", every[8:])
        start = [sys.executable, "-m", "onnxprune"]
        model = str(Path(path_of(args, net)).resolve())
        calibrate = [*start, "calibrate", model, "--data", "few.npy", "--samples", "8", "-o", "c", "-q"]
        subprocess.run(calibrate, cwd=folder, check=True)
        options = ["--macs", "0.5", "--recover", "none", "--validation", "held.npy", "--report", "r.json", "-q"]
        before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [*start, "prune", model, "--calibration", "c", "--method", "pfp", *options, "-o", "o.onnx"], cwd=folder, check=True
        )
        clock, after = time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        stages = {k: v for k, v in json.loads((folder / "r.json").read_text())["seconds"].items() if k != "calibrate"}
        print("| network | " + " | ".join(stages) + " | together | the whole command | of the processor |")
        print("| --- " * (len(stages) + 4) + "|")
        numbers = [*stages.values(), sum(stages.values()), clock, cpu]
        print(f"| {net} | " + " | ".join(f"{v:.1f}" for v in numbers) + " |", flush=True)


def compiling() -> list[list[float]]:
    """Seconds, by the clock and of the processor, that importing the kernels takes with an empty cache, and with a full one."""
    with tempfile.TemporaryDirectory() as cache:
        code = "import time, numba, onnxprune.criteria.pfp; a, b = time.perf_counter(), time.process_time()\n"
        code += "import onnxprune.criteria.compiled; print(time.perf_counter() - a, time.process_time() - b)"
        command, environment = [sys.executable, "-c", code], os.environ | {"NUMBA_CACHE_DIR": cache}
        runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    return [[float(s) for s in r.stdout.splitlines()[-1].split()] for r in runs]


def asked(args: argparse.Namespace, net: str, work: str, threads: int, batch: int | None) -> dict[str, Any]:
    """The JSON that a process of this tool prints for one net and kind of work."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", net, work, "--threads", str(threads)]
    command += ["--model", f"{net}={path_of(args, net)}", *(["--batch", str(batch)] if batch else [])]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(args: argparse.Namespace) -> None:
    cold, warm = compiling()
    print(f"compiling: {cold[0]:.1f} s once ({cold[1]:.1f} s of the processor), {warm[0]:.1f} s to load from then on\n")
    print(
        "| network | batch | mode | inference s | calibration s | ratio | CPU ratio | limit | inference MiB | MiB | allowed |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for net in args.nets:
        timed = asked(args, net, "speed", args.threads, args.batch)
        single = asked(args, net, "speed", 1, timed["batch"])
        plain = asked(args, net, "inference", args.threads, timed["batch"])["peak"]
        for mode in args.modes:
            (clock, _), (base, _) = (timed["seconds"][k] for k in (mode, "inference"))
            ratio = single["seconds"][mode][1] / single["seconds"]["inference"][1]
            most = asked(args, net, mode, args.threads, timed["batch"])["peak"]
            numbers = f"{base:.3f} | {clock:.3f} | {clock / base:.1f} | {ratio:.1f} | {LIMITS[mode]}"
            memory = f"{plain:.0f} | {most:.0f} | {plain * 1.25 + 200:.0f}"
            print(f"| {net} | {timed['batch']} | {mode} | {numbers} | {memory} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["resnet20", "vgg16", "mobilenet_v2", "efficientnet_lite0", "resnet50"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["exact", "bound", "max"])
    parser.add_argument("--model", action="append", default=[], metavar="NET=FILE", help="a file instead of random weights")
    parser.add_argument("--data", help="images, as for `onnxprune calibrate`")
    parser.add_argument("--mean", nargs="+", type=float, default=[0.5])
    parser.add_argument("--std", nargs="+", type=float, default=[0.25])
    parser.add_argument("--size", type=int, default=224, help="where the model leaves it open")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stream", type=int, nargs="+", metavar="N", help="calibrate on N images each, and tell the memory")
    parser.add_argument("--whole", type=int, metavar="N", help="one calibration of N images, seconds")
    parser.add_argument(
        "--rest", type=int, metavar="N", help="all of prune but the calibration, with N validation images, seconds"
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["ONNXPRUNE_THREADS"] = str(args.threads)
    if args.one:
        net, work = args.one
        if work.startswith("stream"):
            print(json.dumps(streamed(args, net, int(work.removeprefix("stream")))))
        else:
            print(json.dumps(speed(args, net) if work == "speed" else peak(args, net, work)))
        return
    with tempfile.TemporaryDirectory() as folder:
        written(args, Path(folder))
        if work := stream if args.stream else whole if args.whole else rest if args.rest else None:
            for net in args.nets:
                work(args, net)
        else:
            table(args)


def written(args: argparse.Namespace, folder: Path) -> None:
    """Files of the networks for which none is given."""
    from networks import NETS

    for net in args.nets:
        if net not in dict(m.split("=", 1) for m in args.model):
            (folder / f"{net}.onnx").write_bytes(NETS[net]().SerializeToString())
            args.model.append(f"{net}={folder / net}.onnx")


if __name__ == "__main__":
    main()
