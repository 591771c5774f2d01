"""From a data set on disk to images, labels and groups.

Manifests, layouts, splits, decoding. No model, no metric, no torch.
"""
