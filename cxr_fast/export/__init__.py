"""A run to verified ONNX files, and heat maps. It trains nothing."""
