"""The GPU kernels against their floors and against attention on exact fp16 states.

    python -m benchmarks.gpu --out benchmarks/results/gpu-h100.json

It fits into ten minutes of one H100 or H200; `--dry` runs everything in Triton's interpreter at toy
sizes, without a time to tell. What runs is checked against fp64 in the same run, on the same data.
"""
