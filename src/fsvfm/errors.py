"""Errors that people see. Each message names the thing, says what was expected and what to do about it."""

from __future__ import annotations


class FsvfmError(Exception):
    """Base of every error this library raises on purpose; the command line prints it without a traceback."""


class ConfigError(FsvfmError):
    """A configuration value is missing, impossible, or contradicts another one."""


class DataError(FsvfmError):
    """A file, image, video or manifest is absent, unreadable or not what it claims to be."""


class FaceModelError(FsvfmError):
    """A face detector, landmark predictor or parser (or its weights) is not available."""


class MaskingError(FsvfmError, ValueError):
    """A masking strategy was given an impossible budget, an unknown region or a malformed grid."""


class CheckpointError(FsvfmError):
    """A checkpoint is unreadable, unsafe, of another architecture, or has keys nobody can explain."""


class MetricError(FsvfmError, ValueError):
    """Scores or labels from which the metric cannot be computed."""


class TrainingStopped(FsvfmError):
    """Training stopped itself (for example after too many non-finite losses); a checkpoint was written first."""


class Preempted(FsvfmError):
    """A signal ended the run in time: a checkpoint continues it. ``status`` is the command's exit status."""

    def __init__(self, message: str, status: int = 75) -> None:
        super().__init__(message)
        self.status = status
