"""Errors meant for people: one class for each kind of remedy, each with its exit code.

The command line prints the message on one line and exits with ``exit_code``; a traceback is
shown with ``--debug`` only.
"""


class CompressorError(Exception):
    """Something the user can act on. The message says what was wrong, where, and what to do."""

    exit_code = 2


class InputError(CompressorError):
    """A flag, file, profile, task or model is wrong: correct it and run again."""


class UnfitMachineError(CompressorError):
    """This machine lacks something: a device, a package, disk or memory."""


class MemoryExhaustedError(UnfitMachineError):
    """Memory ran out while something was tried; with more of it free the same may succeed."""


class WorkerDiedError(UnfitMachineError):
    """A process that works for this one died or fell silent; a new one may do."""


class DeviceFaultError(CompressorError):
    """A GPU's error after which this process computes nothing any more: go on in a new one."""


class StoppedError(CompressorError):
    """One failure after the other: what is wrong is not what was tried."""


class InfeasibleError(CompressorError):
    """No sub-network meets the budgets: raise the one named."""


class RunConflictError(CompressorError):
    """A run folder belongs to another run, model or process: choose another folder."""


class PackageError(CompressorError):
    """A package is damaged or does not agree with what it was made from."""


class TrainingError(CompressorError):
    """Training cannot go on (NaN loss, full disk); the last good state is kept."""
