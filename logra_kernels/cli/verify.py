"""`logra verify`: is every byte of a store as it was written?"""

import argparse
from typing import Any

from tqdm import tqdm

from logra_kernels.cli.outputs import check_outputs
from logra_kernels.report.console import say, warn
from logra_kernels.report.render import plural
from logra_kernels.report.results import STANDARD_OUTPUT, write_json
from logra_kernels.store import Store, verify_store


def run(arguments: argparse.Namespace) -> int:
    """0 if the store is good; 1 with a line for each problem."""
    check_outputs(arguments)
    with tqdm(
        unit="B", unit_scale=True, desc="verify", dynamic_ncols=True, disable=arguments.quick
    ) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        problems = verify_store(arguments.store, not arguments.quick, show)
    store = None if problems else Store.open(arguments.store)
    if arguments.json:
        write_json(_facts(arguments, store, problems), arguments.json)
    if arguments.json == STANDARD_OUTPUT:
        return 1 if problems else 0
    for problem in problems:
        say(problem)
    if store is None:
        warn(f"logra verify: {arguments.store}: {plural(len(problems), 'problem')}")
        return 1
    state = "" if store.finalized else ", not finalized"
    size = f"{plural(store.num_rows, 'row')} in {plural(len(store.shards), 'shard')}"
    say(f"{arguments.store}: good: {size}{state}")
    return 0


def _facts(
    arguments: argparse.Namespace, store: Store | None, problems: list[str]
) -> dict[str, Any]:
    """What --json writes; `store` is None if there are problems."""
    found: dict[str, Any] = {"store": arguments.store, "good": store is not None}
    if store is not None:
        found |= {"rows": store.num_rows, "finalized": store.finalized}
    return {**found, "problems": problems}
