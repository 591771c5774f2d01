"""Run folders as a list: what each is, how far an unfinished one is, its note and its name. Loads without torch."""
