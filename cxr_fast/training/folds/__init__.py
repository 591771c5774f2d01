"""Train one fold of the tail, the head alone, or several folds at once; their draws and losses."""
