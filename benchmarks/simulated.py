"""Several nodes of Ray on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def simulated_cluster(**head: Any) -> Any:
    """``ray.cluster_utils.Cluster`` with a head of these settings; it may be the first Ray of the machine."""
    from ray._private.utils import get_ray_address_file
    from ray.cluster_utils import Cluster

    # Where Ray notes the cluster's address, whatever the head's temp_dir is, without making the folder.
    Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
    return Cluster(initialize_head=True, head_node_args=head)
