"""Hydra configuration groups, packaged as `fsvfm.configs`."""
