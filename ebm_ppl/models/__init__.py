"""Derived models: VAE, flow, critic, as latent-variable models with one contract (`latent.py`)."""
