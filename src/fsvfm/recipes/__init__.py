"""Recipes: raw downloads to face crops, parsing maps and a manifest, one module per data-set family."""
