"""PFP's cascade: prune a little, train, prune a little more, train again; one file for every budget.

    python tools/cascade.py MODEL --data DATA --macs 0.8,0.65,0.5 --finetune EPOCHS -o FOLDER

Each round prunes what the round before it made, and is trained against the original's outputs. Budgets are fractions of the
original's MACs. (Liebenwein et al., ICLR 2020, section 4: the iterative prune-retrain pipeline.)
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnxprune
from onnxprune.data import ImageOptions
from onnxprune.report import terminal


def rounds(
    model: Path, data: str, budgets: list[float], folder: Path, training: onnxprune.Training, images: ImageOptions, samples: int
) -> list[Path]:
    """Writes FOLDER/NAME-BUDGET.onnx for every budget, with its report; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    total, current, made = onnxprune.load(model).size.macs, model, []
    for budget in sorted(budgets, reverse=True):
        share = budget * total / onnxprune.load(current).size.macs
        target = folder / f"{model.stem}-{budget:g}.onnx"
        with tempfile.TemporaryDirectory() as room, terminal.progress(quiet=False) as tell:
            cut = Path(room) / "cut.onnx"
            options = {"images": images, "samples": samples, "seed": training.seed}
            onnxprune.prune(current, data, budget={"macs": share}, method="obs", progress=tell, **options).save(cut)
            said = terminal.epochs(False, training.epochs)
            result = onnxprune.finetune(cut, model, data, training=training, images=images, progress=tell, said=said)
            result.save(target, force=True)
        found = result.report["validation"]
        right = "" if not found["top1"] else ", top-1 {:.2f} % -> {:.2f} %".format(*(100 * v for v in found["top1"]))
        print(f"{target}: {budget:g} of the MACs, same answer as the original {found['agreement']}{right}", flush=True)
        made.append(target)
        current = target
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--macs", required=True, help="fractions of the original's MACs, with commas between them")
    parser.add_argument("--finetune", type=int, default=1, metavar="EPOCHS")
    parser.add_argument("--samples", type=int, default=512, help="for calibration")
    parser.add_argument("--mean", nargs="+", type=float)
    parser.add_argument("--std", nargs="+", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args()
    images = ImageOptions(mean=tuple(args.mean) if args.mean else None, std=tuple(args.std) if args.std else None)
    training = onnxprune.Training(epochs=args.finetune, seed=args.seed)
    budgets = [float(part) for part in args.macs.split(",")]
    rounds(args.model, args.data, budgets, args.out, training, images, args.samples)


if __name__ == "__main__":
    main()
