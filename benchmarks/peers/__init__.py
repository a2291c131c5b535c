"""One T5 v1.1 in several engines: see `benchmarks/peers/__main__.py`."""
