"""`logra verify`: is every byte of a store as it was written?"""

import argparse
import sys

from tqdm import tqdm

from logra_kernels.report.render import plural
from logra_kernels.store import Store, verify_store


def run(arguments: argparse.Namespace) -> int:
    """0 if the store is good; 1 with a line for each problem."""
    with tqdm(
        unit="B", unit_scale=True, desc="verify", dynamic_ncols=True, disable=arguments.quick
    ) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        problems = verify_store(arguments.store, not arguments.quick, show)
    for problem in problems:
        print(problem)
    if problems:
        print(
            f"logra verify: {arguments.store}: {plural(len(problems), 'problem')}",
            file=sys.stderr,
        )
        return 1
    store = Store.open(arguments.store)
    state = "" if store.finalized else ", not finalized"
    size = f"{plural(store.num_rows, 'row')} in {plural(len(store.shards), 'shard')}"
    print(f"{arguments.store}: good: {size}{state}")
    return 0
