"""Errors that a user can cause, each told in one line with the way out.

Every error that a user can cause is a `LlamaError`. Commands print its text and exit with code 2;
library callers may catch it as the `ValueError` that it is. Anything else is a bug of ours.
"""


class LlamaError(ValueError):
    """A mistake of the user's: the message says what is wrong and what to do about it."""


class UsageError(LlamaError):
    """A command line that does not fit the command: unknown flags, missing or misshapen values."""


class CheckpointError(LlamaError):
    """A checkpoint that is missing, damaged, incomplete or contradicts its own parameters."""


class TokenizerError(LlamaError):
    """A tokenizer file that is missing, of no known kind, or does not fit the model."""


class PartitionError(LlamaError):
    """A model that cannot be cut across the ranks asked for."""


class DialogError(LlamaError):
    """A dialog of wrong order or role; the message names the dialog and the turn."""


class DeviceError(LlamaError):
    """A device or dtype that this machine does not have."""


class RankLostError(LlamaError):
    """Another rank went away in the middle of the work."""


class DownloadError(LlamaError):
    """A download that was refused, broke off too often, or differs from what was announced."""


class DataError(LlamaError):
    """Training records that cannot be used; the message names the record and the field."""


class AdapterError(LlamaError):
    """An adapter that is missing, damaged, or made for another model."""


class TrainingError(LlamaError):
    """A training run that cannot start, go on or be resumed."""


class QuantizationError(LlamaError):
    """A way to quantize that does not exist, or that does not fit the model."""
