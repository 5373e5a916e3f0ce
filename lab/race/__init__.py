"""Experiment: the cost of reaching a given quality of the representation, with the official recipe and with cheaper
recipes, at equal tuning."""
