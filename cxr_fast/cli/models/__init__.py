"""The commands on trained models: export, predict, explain, push."""
