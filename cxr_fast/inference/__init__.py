"""An ONNX model file to probabilities: reading, checking, running, writing tables. No torch, no training."""
