"""Where the project lies, and new processes that find it and the samples."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]


def environment() -> dict[str, str]:
    """The environment of a new process that imports the package, its benches and the samples."""
    paths = [str(SUPPORT), str(ROOT), os.environ.get("PYTHONPATH", "")]
    # the benches of other libraries, imported by another test, turn progress bars off
    inherited = {key: value for key, value in os.environ.items() if key != "TQDM_DISABLE"}
    return {**inherited, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def output(*command: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """What a command prints; it ends well. Its environment is `environment()` unless given."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment() if env is None else env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
