"""Backbones, the trained tail and the device they run on. It knows no cache, no fold and no metric."""
