"""Other ways to make a model as small, from its own weights: what super-networks are compared with."""
