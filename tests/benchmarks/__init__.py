"""The commands of tests/benchmark.py, a module each, and what they share."""
