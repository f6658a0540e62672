"""One step in a process of its own: python -m bench.table1.worker STEP SETTING FOLDER OPTIONS OUT

SETTING and OUT are JSON files, OPTIONS is JSON. A process for each step, so that its peak memory is
its own, and so that kronfluence may have another interpreter.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path

import torch

from bench.table1.setting import Setting

# step -> its module and function. A module is imported when its step is asked for: kronfluence's
# environment may lack this package, and ours may lack kronfluence.
STEPS = {
    "ekfac-fit": ("bench.table1.ekfac", "fit"),
    "ekfac-score": ("bench.table1.ekfac", "score"),
    "logra-log": ("bench.table1.logra", "log"),
    "logra-enlarge": ("bench.table1.logra", "enlarge"),
    "logra-query": ("bench.table1.logra", "query"),
    "check-train": ("bench.table1.check", "train"),
    "check-scores": ("bench.table1.check", "scores"),
}


def main(argv: list[str]) -> None:
    """Run one step, and write what it measured."""
    step, setting, folder, options, out = argv
    if step.startswith("ekfac"):
        # kronfluence calls what torch has renamed
        warnings.filterwarnings("ignore", category=FutureWarning)
    module, name = STEPS[step]
    function = getattr(importlib.import_module(module), name)
    measured = function(Setting.read(Path(setting)), Path(folder), json.loads(options))
    measured.update(threads=torch.get_num_threads(), torch=torch.__version__)
    Path(out).write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
