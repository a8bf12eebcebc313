"""Metrics on all samples of a test set: functions of scores, labels and video ids, and torchmetrics modules of them."""
