"""The paper's Table 1, EKFAC (kronfluence) against LoGra: python -m bench.table1 [--quick]"""


def main(argv: list[str] | None = None) -> None:
    """The command; imported late, for kronfluence's environment need not have all that it needs."""
    from bench.table1.command import main as run

    run(argv)
