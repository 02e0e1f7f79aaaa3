"""What the node tells about itself: PolicyStatus and /diagnostics."""

from __future__ import annotations

from time import monotonic

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from std_msgs.msg import Header

from vla_policy_msgs.msg import PolicyStatus
from vla_policy_ros.episodes.shadow import ShadowScore
from vla_policy_ros.ros.messages import to_input_status, to_time
from vla_policy_ros.runtime import PolicyRuntime, State

_CLOCK_STALL_S = 2.0
_LEVELS = {
    State.WAITING: DiagnosticStatus.WARN,
    State.READY: DiagnosticStatus.OK,
    State.RUNNING: DiagnosticStatus.OK,
    State.HOLDING: DiagnosticStatus.WARN,
    State.STOPPED: DiagnosticStatus.WARN,
    State.FAULT: DiagnosticStatus.ERROR,
}


class ClockWatch:
    """Notices that simulated time is of no use. Ask it each time that a status is published."""

    def __init__(self) -> None:
        self._seen = (0, monotonic())

    def problem(self, now_ns: int, use_sim_time: bool) -> str:
        """What is wrong with the node's time ``now_ns``, or an empty string."""
        if now_ns != self._seen[0]:
            self._seen = (now_ns, monotonic())
        if not use_sim_time:
            return ''
        if now_ns == 0:
            return 'use_sim_time is set but no /clock has arrived: start the simulator or the bag player with a clock'
        stalled = monotonic() - self._seen[1]
        return f'/clock has not advanced for {stalled:.1f} s' if stalled > _CLOCK_STALL_S else ''


def policy_status(runtime: PolicyRuntime, now_ns: int, lifecycle_state: str, hashes: tuple[str, str]) -> PolicyStatus:
    """The status of a configured node."""
    counters, settings = runtime.counters, runtime.settings
    return PolicyStatus(
        header=Header(stamp=to_time(now_ns)),
        state=int(runtime.state),
        state_name=runtime.state.name,
        reason=runtime.reason,
        lifecycle_state=lifecycle_state,
        dry_run=settings.dry_run,
        instruction=runtime.inputs.instruction,
        replan_rate=settings.replan_rate,
        chunk_rate=runtime.chunk_rate(now_ns),
        observations=counters.observations,
        chunks=counters.chunks,
        trajectories_published=counters.trajectories_published,
        trajectories_rejected=counters.trajectories_rejected,
        trajectories_not_accepted=counters.trajectories_not_accepted,
        requests_skipped=counters.requests_skipped,
        inference_in_flight=runtime.inference_in_flight,
        inference_age=runtime.inference_age(now_ns),
        latency_p50_ms=runtime.latency_percentile(50),
        latency_p99_ms=runtime.latency_percentile(99),
        commanded_until=runtime.commanded_until(now_ns),
        inputs=[to_input_status(health) for health in runtime.inputs.health(now_ns)],
        checkpoint_hash=hashes[0],
        stats_hash=hashes[1],
    )


def unconfigured_status(now_ns: int, lifecycle_state: str, fault: str) -> PolicyStatus:
    """The status of a node without a runtime: waiting to be configured, or unable to be."""
    state = State.FAULT if fault else State.WAITING
    reason = fault or 'not configured'
    return PolicyStatus(
        header=Header(stamp=to_time(now_ns)),
        state=int(state),
        state_name=state.name,
        reason=reason,
        lifecycle_state=lifecycle_state,
    )


def diagnostics(status: PolicyStatus, node_name: str, hardware_id: str, shadow: ShadowScore | None = None) -> DiagnosticArray:
    """The same as diagnostic_msgs: one row for the policy, one per input, and one for what a policy in dry run would be worth."""
    fields = (
        'lifecycle_state', 'dry_run', 'instruction', 'replan_rate', 'chunk_rate', 'observations', 'chunks',
        'trajectories_published', 'trajectories_rejected', 'trajectories_not_accepted', 'requests_skipped', 'latency_p50_ms',
        'latency_p99_ms', 'checkpoint_hash', 'stats_hash',
    )  # fmt: skip
    rows = [
        DiagnosticStatus(
            level=_LEVELS[State(status.state)],
            name=f'{node_name}: policy',
            message=f'{status.state_name}: {status.reason}' if status.reason else status.state_name,
            hardware_id=hardware_id,
            values=[KeyValue(key=field, value=str(getattr(status, field))) for field in fields],
        )
    ]
    for health in status.inputs:
        rows.append(
            DiagnosticStatus(
                level=DiagnosticStatus.OK if health.ok else DiagnosticStatus.WARN,
                name=f'{node_name}: {health.name}',
                message=health.reason or 'ok',
                hardware_id=hardware_id,
                values=[
                    KeyValue(key='topic', value=health.topic),
                    KeyValue(key='rate_hz', value=f'{health.rate:.2f}'),
                    KeyValue(key='age_s', value=f'{health.age:.3f}'),
                    KeyValue(key='max_age_s', value=f'{health.max_age:.3f}'),
                ],
            )
        )
    if shadow is not None:
        rows.append(_shadow_row(shadow, node_name, hardware_id))
    return DiagnosticArray(header=status.header, status=rows)


def _shadow_row(shadow: ShadowScore, node_name: str, hardware_id: str) -> DiagnosticStatus:
    values = {
        'compared_with': shadow.source,
        'window_s': f'{shadow.window_s:g}',
        'chunks': str(shadow.chunks),
        'mae': f'{shadow.error.mae:.6f}',
        'rmse': f'{shadow.error.rmse:.6f}',
        'hold_rmse': f'{shadow.hold.rmse:.6f}',
        'first_step_rmse': f'{shadow.error.step_rmse[0]:.6f}',
        'last_step_rmse': f'{shadow.error.step_rmse[-1]:.6f}',
        'worst_joint': shadow.joint,
        'worst_joint_rmse': f'{shadow.error.joint_rmse.max():.6f}',
    }
    return DiagnosticStatus(
        level=DiagnosticStatus.WARN if shadow.worse_than_hold else DiagnosticStatus.OK,
        name=f'{node_name}: shadow',
        message=('worse than standing still: ' if shadow.worse_than_hold else '') + shadow.sentence,
        hardware_id=hardware_id,
        values=[KeyValue(key=key, value=value) for key, value in values.items()],
    )
