"""The configurations of a search beside each other: which is chosen, and the tables that record all of them."""
