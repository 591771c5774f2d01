"""Dataset shift: what a model answers in daily use, compared with what it answered for the hold-out."""
