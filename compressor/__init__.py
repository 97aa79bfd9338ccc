"""From a LLaMA-family model and a hardware profile to a package that serves."""

__version__ = "0.1.0"
