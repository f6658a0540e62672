"""`logra compress`: a store's rows under another codec."""

import argparse
from pathlib import Path

from tqdm import tqdm

from logra_kernels.attribution import compress_store
from logra_kernels.report.console import say
from logra_kernels.report.render import plural
from logra_kernels.store import Store


def run(arguments: argparse.Namespace) -> int:
    """Write the new store, and say how large both are."""
    store = Store.open(Path(arguments.store))
    with tqdm(total=store.num_rows, unit="row", desc="compress", dynamic_ncols=True) as bar:

        def show(done: int, _: int) -> None:
            bar.update(done - bar.n)

        made = compress_store(store, Path(arguments.out), arguments.codec, progress=show)
    say(
        f"{arguments.out}: {plural(made.num_rows, 'row')} of {made.row_bytes:,} bytes in "
        f"{made.dtype}; {arguments.store} has {store.row_bytes:,} a row in {store.dtype}"
    )
    return 0
