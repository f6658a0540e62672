"""The paper's Table 1, EKFAC (kronfluence) against LoGra: python -m bench.table1 [--quick]"""
