"""Experiments at small scale: training and testing lists of trials."""
