"""What helps a reader at a glance: probabilities film by film, thresholds that move, findings mistaken for others."""
