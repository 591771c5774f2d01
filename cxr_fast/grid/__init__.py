"""Which configurations a sweep trains: axes read from `--grid`, and the points made of them.

Knows specs and errors alone: nothing of data, training or files.
"""
