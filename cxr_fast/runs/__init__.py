"""Run folders: the list of them, their notes and names, what they were asked for; only `sweep` loads torch."""
