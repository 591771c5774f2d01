"""cxr-fast: fine-tune BiomedCLIP on chest radiographs from cached activations."""

__version__ = "0.1.0"
