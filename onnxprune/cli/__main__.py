"""`python -m onnxprune.cli` is the command line too."""

import sys

from onnxprune.cli.program import main

sys.exit(main())
