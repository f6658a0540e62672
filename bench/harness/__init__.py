"""What every benchmark needs: cases, timing, limits, memory, results."""
