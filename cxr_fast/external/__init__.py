"""A model file on labelled films of others: every figure of the report, and thresholds set there; loads no torch."""
