"""python -m bench.table1"""

from bench.table1.command import main

if __name__ == "__main__":
    main()
