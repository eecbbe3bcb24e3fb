"""Learning an energy from data: one loop (`fit.py`), and objectives, each a pair of functions (`objective.py`)."""
