"""What every benchmark needs: cases, timing in turns, limits, tables, memory, results."""
