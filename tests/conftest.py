"""Test processes run side by side: each keeps to one thread, or they would wait for each other."""

from __future__ import annotations

import os

os.environ.setdefault("ONNXPRUNE_THREADS", "1")
