"""Hold-out and folds: what is given, what is drawn, and the methods that draw."""
