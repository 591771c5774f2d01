"""Folds, epoch search and the run folder, from cached activations. It knows no ONNX, no page and no cluster."""
