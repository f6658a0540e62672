"""Where the project lies, and the environment in which a new process finds it and the samples."""

import os
from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]


def environment() -> dict[str, str]:
    """The environment of a new process that imports the package, its benches and the samples."""
    paths = [str(SUPPORT), str(ROOT), os.environ.get("PYTHONPATH", "")]
    # the benches of other libraries, imported by another test, turn progress bars off
    inherited = {key: value for key, value in os.environ.items() if key != "TQDM_DISABLE"}
    return {**inherited, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
