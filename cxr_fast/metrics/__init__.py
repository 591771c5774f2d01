"""Figures, intervals, thresholds and calibration of labels and probabilities as arrays; no file, model or torch."""
