"""What tools/benchmark.py measures. Each verb is a module; its ``run(args)`` yields rows as
:func:`benchmarks.common.row` makes them, with further measures by name."""
