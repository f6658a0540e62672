"""python -m bench.table1"""

from bench.table1 import main

main()
