"""dmap measured beside its peers, and beside what no peer can beat. ``python -m benchmarks``."""
