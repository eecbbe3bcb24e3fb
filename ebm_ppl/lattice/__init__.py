"""Energies of discrete data (`energy.py`), and the Markov kernels that move such data (`gibbs.py`)."""
