"""The trained model from pixels to logits, as one torch module."""
