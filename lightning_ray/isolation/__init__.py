"""Agents in processes of their own, one attempt at a time in each: what crashes or hangs there costs one attempt.

The processes are warm: each imports the agent once. ``child`` is what runs in them, ``interpreter``
which Python that is, ``frames`` what is said on the line between them and the runner, ``process`` the runner's end of
it, ``calls`` the seam to the runner.
"""
