"""What tools/benchmark.py measures, a verb a module: ``add_arguments(parser)`` and ``run(args)``, which yields rows
{"what", "baseline", "baseline_s", "ours_s", "ratio" = baseline_s / ours_s, and measures of accuracy by name}."""
