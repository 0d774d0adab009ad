"""What a person is told when a part of a run dies: who, why, what was lost, and what happens next.

process   who it is: role, name, node, pid, log; known while it lives
told      what Ray says of its end
evidence  what its node says: exit status, the kernel's memory kills, the last lines of its log
death     all of these in one sentence, and as a line of events.jsonl
watch     notices the deaths that no call of the run would: store, replicas, Serve, nodes, Ray itself
"""

from lightning_ray.deaths.death import Death, death_of
from lightning_ray.deaths.process import Process, here
from lightning_ray.deaths.told import told_of

__all__ = ["Death", "Process", "death_of", "here", "told_of"]
