"""The command line: one module per family of commands; `program.main` runs them."""

from onnxprune.cli.program import main

__all__ = ["main"]
