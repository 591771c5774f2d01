"""Files, locks, hardware, text and tables: what any program needs. It knows nothing of films, models or commands."""
