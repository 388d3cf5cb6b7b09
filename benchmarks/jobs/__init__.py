"""Jobs as people have them, beside nothing tuned and ten random trials: `python -m benchmarks.jobs`."""
