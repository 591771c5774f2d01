"""What commands print: plans, hints and results as text and tables. Knows no option and runs nothing."""
