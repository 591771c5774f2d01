"""Synthetic radiographs with findings, drawn from a seed, in the layout of the Indiana data set."""
