"""What tools/benchmark.py measures. Each verb is a module; its ``run(args)`` yields rows with the keys "what",
"baseline", and those of :func:`benchmarks.common.ratio`, and measures of accuracy by name."""
