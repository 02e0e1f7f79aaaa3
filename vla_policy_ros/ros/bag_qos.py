"""Quality of service between rclpy's profiles and the ones that a bag stores."""

from __future__ import annotations

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime

# What rosbag2 stores for "no limit".
_INFINITE = QosTime(9223372036, 854775807)
_DEPTH_OF_KEEP_ALL = 100


def to_bag_qos(profile: QoSProfile) -> Qos:
    """What a publisher offers, as a bag stores it. Deadlines and lifespans are not kept: they speak about the live system."""
    reliable = profile.reliability != ReliabilityPolicy.BEST_EFFORT
    latched = profile.durability == DurabilityPolicy.TRANSIENT_LOCAL
    return Qos(
        history=QosHistory.KEEP_LAST,
        depth=max(1, profile.depth),
        reliability=QosReliability.RELIABLE if reliable else QosReliability.BEST_EFFORT,
        durability=QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE,
        deadline=_INFINITE,
        lifespan=_INFINITE,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=_INFINITE,
        avoid_ros_namespace_conventions=False,
    )


def from_bag_qos(stored: Qos | None) -> QoSProfile:
    """The profile to publish with. Without a stored one: reliable and volatile, which every volatile subscriber accepts."""
    if stored is None:
        return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=10, reliability=ReliabilityPolicy.RELIABLE)
    best_effort = stored.reliability == QosReliability.BEST_EFFORT
    latched = stored.durability == QosDurability.TRANSIENT_LOCAL
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=_DEPTH_OF_KEEP_ALL if stored.history == QosHistory.KEEP_ALL else max(1, stored.depth),
        reliability=ReliabilityPolicy.BEST_EFFORT if best_effort else ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )
