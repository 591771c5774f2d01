"""The command that encodes: flags and plan, progress and outcome, settings and rows of earlier caches."""
