"""The cache: activation files written, checked, streamed and loaded. It knows no loss, no fold and no metric."""
