"""`python -m trl_reasoning_distill.scripts STAGE …`: how `trl-distill` starts a stage, alone or on each rank of a launch.

The scripts are not started as files: their folder would come first on Python's path, and `select.py` would hide the standard
library's `select`.
"""

from __future__ import annotations

import importlib
import sys

from trl_reasoning_distill.scripts import STAGES


def main() -> None:
    """Run the stage that the first word names with the other words as its options."""
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        sys.exit(f"usage: python -m trl_reasoning_distill.scripts {{{','.join(STAGES)}}} …")
    stage = sys.argv[1]
    importlib.import_module(f"trl_reasoning_distill.scripts.{stage}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
