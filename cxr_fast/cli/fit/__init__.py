"""`cxrfast fit`: prepare, cache, sweep, export and verify as one command that calls the others."""
