"""A run folder to its page, tables, charts and card. It imports no torch at top level and trains nothing."""
