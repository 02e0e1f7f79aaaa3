"""From messages to `Observation`: decode, intrinsics, joint order, ages and skew.

Enters: sensor messages (rclpy's or rosbags', read by attribute only) with the time they arrived. Leaves: an `Observation`, or the
sentence that says why there is none. The slots are filled and judged on the thread that receives messages, without touching
pixels; `Snapshot.decode` does the expensive part and runs on the policy's executor thread.
"""

from vla_policy_ros.observation.assembly import InputHealth, ObservationAssembler, ObservationError, Snapshot

__all__ = ['InputHealth', 'ObservationAssembler', 'ObservationError', 'Snapshot']
