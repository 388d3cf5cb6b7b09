"""What the applications refuse, as exceptions whose message is one line that a command can print as it is."""

from __future__ import annotations

from bilevel import BilevelError


class DataError(ValueError):
    """A data set cannot be read, is damaged, or has fewer examples than were asked for."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message is the command that installs it."""


class TrainingError(BilevelError):
    """A function of the user's failed while a model was trained; the message is its error, and where it arose."""
