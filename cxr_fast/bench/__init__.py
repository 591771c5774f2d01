"""Latency, throughput and comparisons, each with n, spread and the machine it ran on."""
