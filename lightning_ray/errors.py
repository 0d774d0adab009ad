"""Errors that name the thing, its value and the fix.

Whatever a user can get wrong ends in one of these; the command line prints the message alone and exits
with a code other than 0. A traceback means a defect of ours.
"""

from __future__ import annotations


class LightningRayError(Exception):
    """Base of all errors with a message that a user can act on."""


class ConfigError(LightningRayError):
    """A setting, path or data set is unusable; nothing was started."""


class StoreError(LightningRayError, ValueError):
    """The span store refused a call: unknown rollout, illegal state change, unreadable folder.

    A ValueError too, as callers of Agent Lightning's store expect.
    """


class AgentError(LightningRayError, ValueError):
    """The user's agent broke its contract: wrong signature, illegal return value.

    A ValueError too, as agents of Agent Lightning expect.
    """


class InfrastructureError(LightningRayError):
    """A part of the system died or stayed silent past its deadline. Never scored as a reward."""


class TrainersLostError(InfrastructureError):
    """A trainer rank died or stayed silent; the ranks can be started anew from the last checkpoint."""

    def __init__(self, message: str = "", silent: bool = False):
        super().__init__(message)
        self.silent = silent
        """Whether it lives, and may only be slow."""


class SwapError(LightningRayError):
    """A weight swap could not be proved on a replica."""


def last_line(error: BaseException) -> str:
    """What an error says last, without the stack of another process before it: at most 300 characters."""
    said = (line.strip() for line in str(error).splitlines()[::-1] if line.strip())
    return next(said, type(error).__name__)[:300]
