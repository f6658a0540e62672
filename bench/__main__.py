"""Every bench, one after the other: python -m bench [--quick] [--threads N] [--json]"""

import importlib
import sys

from bench._harness import arguments

BENCHES = (
    "project",
    "per_sample_gradients",
    "projected_gradients",
    "covariance_update",
    "scores",
    "topk_scores",
    "self_influence",
    "pack_rows",
    "logging",
    "attribution",
)


def main() -> None:
    arguments(__doc__)  # --help, and a wrong option, before anything runs
    for name in BENCHES:
        importlib.import_module(f"bench.bench_{name}").main(sys.argv[1:])
        print()


if __name__ == "__main__":
    main()
