"""data.splits on toys, at the sizes of real data sets, and on real data."""
