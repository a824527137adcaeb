"""Speed and memory as ratios against a rival in one run; `python -m tests.benchmarks.NAME`, last line JSON."""
