"""The configurations of a search on the page: tables over configurations and seeds, and a picture of what was tried."""
