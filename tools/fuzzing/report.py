"""What a run of the fuzzer comes to: counts, findings, and which operators channels were cut through."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from fuzzing import table
from fuzzing.check import Finding, Outcome
from onnxprune.rules import STANDARD


class Tally:
    """Counts over graphs; a finding is printed as soon as it is added."""

    def __init__(self) -> None:
        self.status: Counter[str] = Counter()
        self.discarded: Counter[str] = Counter()
        self.findings: list[tuple[int, str, Finding]] = []
        self.notes: Counter[str] = Counter()
        self.present: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.nodes = self.groups = self.prunable = self.with_prunable = self.plans = 0
        self.worst = 0.0

    def add(self, seed: int, made: Outcome) -> None:
        self.status[made.status] += 1
        self.refused += made.refused
        if made.status == "discarded":
            self.discarded[re.sub(r"'[^']*'|\d+", "_", made.why)[:110]] += 1
            return
        self.nodes += made.nodes
        self.groups += made.groups
        self.prunable += made.prunable
        self.with_prunable += bool(made.prunable)
        self.plans += made.plans
        self.worst = max(self.worst, made.worst)
        self.notes += made.notes
        self.present.update(made.present)
        self.cut.update(made.cut)
        for finding in made.findings:
            self.findings.append((seed, made.story, finding))
            print(f"graph {seed} ({made.story}), plan '{finding.plan}': {finding.kind}: {finding.text}", flush=True)

    @property
    def tried(self) -> int:
        return self.status.total() - self.status["discarded"]

    def summary(self, seconds: float) -> str:
        """Several lines and a table of operators: graphs that hold each, and graphs in which it was cut through."""
        tried = max(1, self.tried)
        wrong = len({seed for seed, _, _ in self.findings})
        kinds = Counter(finding.kind for _, _, finding in self.findings)
        lines = [
            f"{self.status.total()} graphs in {seconds:.0f} s: {self.tried} tried, {self.status['discarded']} discarded, "
            f"{self.refused.total()} operators refused by ONNX Runtime while graphs were made",
            f"{100 * self.with_prunable / tried:.1f} % have channels to prune; on average {self.prunable / tried:.2f} "
            f"groups that can be pruned, of {self.groups / tried:.2f}, and {self.nodes / tried:.1f} nodes; {self.plans} plans",
            f"largest error that passed: {self.worst:.2g} of an output's range",
            f"{wrong} graphs with something wrong: " + (", ".join(f"{n} {k}" for k, n in kinds.most_common()) or "none"),
            f"noted: {dict(self.notes)}",
            *(f"discarded {n}: {why}" for why, n in self.discarded.most_common(12)),
            "operator: graphs with it, graphs in which channels that pass through it were cut",
        ]
        cells = [f"{op} {self.present[op]} {self.cut[op]}" for op in sorted(self.present)]
        lines += ["  ".join(cells[i : i + 6]) for i in range(0, len(cells), 6)]
        absent = self.absent()
        lines.append("operators with a rule that no graph held: " + (", ".join(absent) or "none"))
        return "\n".join(lines)

    def absent(self) -> list[str]:
        """The operators that can be put into graphs and have a rule, but were in none."""
        names = {f"{domain}::{op}" if domain else op for domain, op in table.MAKERS if (domain, op) in STANDARD}
        return sorted(names - set(self.present))

    def to_json(self) -> dict[str, Any]:
        return {
            "status": dict(self.status),
            "plans": self.plans,
            "prunable": {"graphs": self.with_prunable, "groups": self.prunable},
            "discarded": dict(self.discarded),
            "findings": [
                {"seed": s, "story": story, "kind": f.kind, "plan": f.plan, "text": f.text} for s, story, f in self.findings
            ],
            "notes": dict(self.notes),
            "operators": {op: [self.present[op], self.cut[op]] for op in sorted(self.present)},
        }
