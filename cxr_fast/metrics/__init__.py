"""Figures from labels and probabilities, as arrays. It knows no file of ours, no model and no torch."""
