"""What is raised when the user, not the program, has to change something."""


class InputError(ValueError):
    """Wrong input: one sentence that names the option, the value that came, and the way out.

    The command line prints it without a traceback and exits with code 2.
    """


class ProcessLostError(RuntimeError):
    """Another process of the run has ended; what it had finished is on disk.

    The command line prints it without a traceback and exits with code 1.
    """
