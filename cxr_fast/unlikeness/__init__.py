"""How far a film is from the training films, by the frozen features that its model computes on the way."""
