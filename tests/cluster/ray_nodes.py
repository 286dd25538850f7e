"""Arguments that start small Ray nodes with the settings that `forecache serve` uses."""

from typing import Any

from forecache.cluster.launch.cluster import RAY_SYSTEM_CONFIG

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
HEAD: dict[str, Any] = {**NODE, "include_dashboard": False, "_system_config": RAY_SYSTEM_CONFIG}
