"""How good samples are: distances, precision and recall, fidelity, replay, how sure the numbers are, and the report."""
