"""Benchmarks: each compares in one run, so that a ratio holds on whatever machine it runs."""
