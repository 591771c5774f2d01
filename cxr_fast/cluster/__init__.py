"""Caching, training and predicting on a Ray cluster: the only package that names ray."""
