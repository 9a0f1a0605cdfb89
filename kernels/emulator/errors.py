"""What stops an emulation."""


class Refused(NotImplementedError):
    """The program does something that is not modelled."""


class Parted(Refused):
    """Threads or blocks differ where all of them have to do the same."""


class Fault(RuntimeError):
    """The program does something that no GPU would carry out, or waits for ever."""
