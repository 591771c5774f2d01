"""`from cxr_fast.predict import Predictor`: the name that users write; the code is in `inference`."""

from .inference.predictor import BATCH, Predictor, Result

__all__ = ["BATCH", "Predictor", "Result"]
