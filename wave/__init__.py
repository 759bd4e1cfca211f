"""Wave: operating-system policies decided on an infrastructure processor, enforced on the host."""

__version__ = "0.1.0"
