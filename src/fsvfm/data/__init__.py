"""Manifests, data sets and Lightning data modules."""
