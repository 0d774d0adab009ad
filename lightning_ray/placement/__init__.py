"""Where the parts of a run go: by the labels of nodes, within what the cluster has, or not at all and said at once.

settings  what a user says: a label, CPUs for each role
asks      what a run asks for, by role: so many, of these resources, on nodes labelled so
view      what the cluster has: nodes, what is free, what the autoscaler could add
packing   whether the asks have a place; a pure function over both
refusal   the message when they have not
room      looks, waits for room with a deadline, or refuses
heard     whether agents on other nodes reach the policy
unseen    which nodes do not see a folder
"""

from lightning_ray.placement.settings import Placement, RolePlacement

__all__ = ["Placement", "RolePlacement"]
