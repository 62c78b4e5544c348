"""Training steps in plain torch, and tests that compare recorded runs with them."""
