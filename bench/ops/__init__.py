"""One benchmark for each op: a module has `case`, one table, and `cases`, its tables."""
