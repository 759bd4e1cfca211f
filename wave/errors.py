"""What can go wrong, in two levels that users catch.

WaveError
├── ConfigError      a scenario, profile, flag or file says something that cannot be (unknown key, wrong unit, broken trace)
├── PolicyError      a policy is not well formed, raised, never answered, or decided what no one may decide
├── LinkError        a link cannot be opened, is taken, was lost, or its peer speaks another version
└── MissingError     an optional part is not installed; the message says which, why and how to get it

Every message says what was got, what is allowed, and what to do.
"""


class WaveError(Exception):
    """Any error that Wave explains. `wave` prints it as one line and exits with `exit_code`."""

    exit_code = 1


class ConfigError(WaveError):
    """A scenario, profile, flag or input file is wrong."""

    exit_code = 2


class PolicyError(WaveError):
    """A policy is malformed, failed while running, or broke the contract."""

    exit_code = 3


class LinkError(WaveError):
    """A link cannot be used."""

    exit_code = 4


class MissingError(WaveError):
    """An optional part is missing."""

    exit_code = 5
