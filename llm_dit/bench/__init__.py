"""Benchmarks: measured in fresh processes, reported as tables and JSON."""
