"""How good an energy is: tests of its fit to data, held-out likelihood, and how its chains mix."""
