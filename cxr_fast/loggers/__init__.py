"""Send the epochs and figures of a sweep to TensorBoard, MLflow or Weights & Biases; each library is an extra."""
