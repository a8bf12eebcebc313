"""Metrics on all samples of a test set: pure functions of scores, labels and video ids."""
