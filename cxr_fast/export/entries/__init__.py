"""Entries of a model file that an export writes: how it was asked for, and what was measured on films."""
