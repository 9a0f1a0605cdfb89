"""Errors a user can act on. Messages name the offending value and the way out; the command line exits with 2."""

EXIT_FAULT = 1  # of the program, or of the machine
EXIT_PUT_RIGHT = 2  # somebody has to; the same command again would end the same way
EXIT_TRY_AGAIN = 75  # nothing is wrong but the moment, as in sysexits.h


class JaxHybridError(Exception):
    """Base of every error that is the input's fault, not the program's."""

    shared = False  # raised by every process of a run on many hosts; the first one's log is then enough


class ConfigError(JaxHybridError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class WeightsError(JaxHybridError):
    """A weights folder is missing, truncated, or does not match its config."""


class DataError(JaxHybridError):
    """A text source is empty, lacks a column, or does not fit the model."""


class TopologyError(JaxHybridError):
    """Arrays do not divide over the mesh, or the mesh is of a kind not built yet."""


class RunError(JaxHybridError):
    """A run folder belongs to another config, cannot be written, or lacks a stage's result."""


class DamageError(RunError):
    """What lies on the disk is not what was written there."""


class DivergenceError(JaxHybridError):
    """Training produced a value that is not finite."""


def exit_code(error: BaseException) -> int:
    """What a process ends with that this ends."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_FAULT
    return getattr(error, "exit_code", EXIT_PUT_RIGHT) if isinstance(error, JaxHybridError) else EXIT_FAULT
