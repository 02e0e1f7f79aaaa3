"""The tip of the arm never leaves its box by more than the stated tolerance, whatever the trajectory; and a larger box never costs.

The checks sample the interpolant every 0.5 ms by Bernstein polynomials and share no code with the judge. The arm is the
simulator's, written down once more as a URDF.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from arm import MS, SPACING, T0, Array, arm_urdf, dense, tips, trajectory
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_policy_ros.control.follower import Follower
from vla_policy_ros.control.kinematics import Chain
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.workspace import TOLERANCE_M, Band, Fit, Workspace, fit_inside
from vla_policy_ros.sim.mjcf import JOINT_NAMES
from vla_policy_ros.sim.scene import HOME
from vla_policy_ros.types import JointTrajectory


@pytest.fixture(scope='session')
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    path = tmp_path_factory.mktemp('urdf') / 'arm.urdf'
    path.write_text(arm_urdf())
    return Chain.from_urdf(path, JOINT_NAMES, 'tcp', 'link0')


def excess(workspace: Workspace, points: Array, margin: float | None = None) -> Array:
    """How far each point lies beyond each face, m, ``[P, 6]``; 0 inside."""
    margin = workspace.margin if margin is None else margin
    faces = np.hstack([workspace.lower + margin - points, points - workspace.upper + margin])
    return np.maximum(faces, 0.0)


@dataclass
class Motion:
    """A motion that a follower makes and can stop at any knot, as the planner does."""

    limits: JointLimits
    path: JointTrajectory

    @classmethod
    def random(cls, rng: np.random.Generator, joints: int = 7) -> Motion:
        ones = np.ones(joints)
        limits = JointLimits(JOINT_NAMES[:joints], -4 * ones, 4 * ones, 2.0 * ones, 8.0 * ones)
        start = HOME[:joints] + rng.normal(0.0, 0.3, joints)
        t = SPACING * 1e-9 * np.arange(int(rng.integers(2, 70)))[:, None]
        size, rate, phase = rng.uniform(0.0, 0.8, joints), rng.uniform(0.5, 4.0, joints), rng.uniform(0, 6.3, joints)
        wanted = start + size * (np.sin(rate * t + phase) - np.sin(phase))
        moving = size * rate * np.cos(rate * t + phase)
        follower = Follower(limits, limits.velocity, SPACING * 1e-9, 8.0, start, np.clip(moving[0], -1.0, 1.0))
        follower.follow(wanted, moving)
        follower.rest_together()
        return cls(limits, trajectory(follower.knots.positions, follower.knots.velocities, names=limits.names))

    def stop(self, knot: int) -> JointTrajectory:
        q, v = self.path.positions, self.path.velocities
        follower = Follower(self.limits, self.limits.velocity, SPACING * 1e-9, 8.0, q[knot], v[knot])
        follower.rest_together()
        knots = follower.knots
        return trajectory(np.vstack([q[:knot], knots.positions]), np.vstack([v[:knot], knots.velocities]), names=self.limits.names)

    def fit(self, workspace: Workspace) -> Fit:
        return fit_inside(self.path, workspace, self.stop)


def box(chain: Chain, below: Array | float, above: Array | float, margin: float = 0.0) -> Workspace:
    """From ``below`` the tip at home to ``above`` it, m."""
    tip = tips(HOME[None])[0]
    return Workspace(JOINT_NAMES, chain, tip - below, tip + above, margin)


def box_around(chain: Chain, point: Array, rng: np.random.Generator, margin: float = 0.0) -> Workspace:
    """A random box that mostly holds ``point``, and sometimes not."""
    lower, upper = point - rng.uniform(-0.03, 0.3, 3), point + rng.uniform(-0.03, 0.3, 3)
    return Workspace(JOINT_NAMES, chain, np.minimum(lower, upper - 0.1), upper, margin)


class TestJudge:
    @settings(max_examples=150, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_up_to_the_stated_moment_the_curve_is_inside_by_the_stated_tolerance(self, chain: Chain, seed: int) -> None:
        rng = np.random.default_rng(seed)
        spacing = int(rng.choice([20, 50, 200, 500])) * MS
        q = HOME + np.cumsum(rng.normal(0, rng.choice([0.01, 0.1, 0.5]), (int(rng.integers(2, 12)), 7)), axis=0)
        motion = trajectory(q, rng.normal(0, rng.choice([0.0, 0.5, 2.0]), q.shape), spacing)
        workspace = box_around(chain, tips(q[:1])[0], rng, rng.choice([0.0, 0.02]))
        verdict = workspace.judge(motion)
        points = tips(dense(motion, verdict.until_ns))
        assert np.all(excess(workspace, points) <= excess(workspace, points[:1]) + TOLERANCE_M)
        if verdict.band is Band.PASS:
            assert verdict.until_ns == T0 + motion.times_ns[-1] and verdict.last_knot == len(q) - 1 and not verdict.reason
        else:
            assert verdict.reason and motion.times_ns[verdict.last_knot] <= verdict.until_ns - T0

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_what_stays_inside_by_the_margin_passes(self, chain: Chain, seed: int) -> None:
        rng = np.random.default_rng(seed)
        motion = Motion.random(rng).path
        points = tips(dense(motion))
        workspace = Workspace(JOINT_NAMES, chain, points.min(axis=0) - 0.03, points.max(axis=0) + 0.03, 0.029)
        verdict = workspace.judge(motion)
        assert verdict.band is Band.PASS, verdict.reason
        assert 0.029 < verdict.clearance <= 0.03 + TOLERANCE_M

    def test_a_path_that_leaves_is_clamped_where_it_leaves(self, chain: Chain) -> None:
        motion = swing(0.5)
        verdict = box(chain, 0.1, 0.1, 0.02).judge(motion)
        points = tips(dense(motion))
        leaves = np.argmax(points[:, 1] > points[0, 1] + 0.08) * MS / 2
        assert verdict.band is Band.CLAMP
        assert leaves - SPACING <= verdict.until_ns - T0 <= leaves
        assert 'y = ' in verdict.reason and 'margin of 0.02' in verdict.reason and verdict.clearance < 0

    @pytest.mark.parametrize('outwards', [0.5, 0.0])
    def test_outside_at_the_seam_only_a_motion_inwards_is_let_through(self, chain: Chain, outwards: float) -> None:
        outside = box(chain, np.array([0.1, 0.4, 0.1]), np.array([0.1, -0.02, 0.1]))
        rejected = outside.judge(swing(outwards))
        assert rejected.band is Band.REJECT and rejected.until_ns == T0 and rejected.last_knot == 0
        assert 'outside' not in rejected.reason and 'does not move inwards' in rejected.reason and 'y = ' in rejected.reason
        assert outside.judge(swing(-0.3)).band is Band.PASS

    def test_outside_at_the_seam_the_way_in_may_not_lead_out_again(self, chain: Chain) -> None:
        outside = box(chain, np.array([0.1, 0.4, 0.1]), np.array([0.1, -0.02, 0.1]))
        for back in (0.2, 0.3):
            there_and_back = swing(-0.2, back)
            verdict = outside.judge(there_and_back)
            assert verdict.band is Band.CLAMP
            y = tips(dense(there_and_back, verdict.until_ns))[:, 1]
            assert y.max() <= y[0] + TOLERANCE_M

    def test_closer_than_the_margin_a_path_may_stay_but_get_no_closer(self, chain: Chain) -> None:
        band = box(chain, 0.1, np.array([0.1, 0.01, 0.1]), 0.05)
        assert band.judge(swing(0.0)).band is Band.PASS and band.judge(swing(-0.1)).band is Band.PASS
        assert band.judge(swing(0.1)).band is Band.CLAMP

    def test_what_lies_before_the_seam_is_not_judged(self, chain: Chain) -> None:
        back = swing(0.5, -0.5)
        half = len(back.times_ns) // 2
        workspace = box(chain, 0.5, np.array([0.5, 0.1, 0.5]))
        assert workspace.judge(back).band is Band.CLAMP
        seam = workspace.judge(back, T0 + int(back.times_ns[half]))
        assert seam.band is Band.PASS and seam.last_knot == len(back.times_ns) - 1

    def test_columns_in_another_order_are_judged_alike(self, chain: Chain) -> None:
        workspace = box(chain, 0.1, 0.1)
        assert workspace.judge(swing(0.5).select(JOINT_NAMES[::-1])) == workspace.judge(swing(0.5))

    def test_a_trajectory_that_cannot_be_judged_is_an_error(self, chain: Chain) -> None:
        workspace, motion = box(chain, 1.0, 1.0), swing(0.1)
        with pytest.raises(ValueError, match='not finite'):
            workspace.judge(replace(motion, positions=np.where(np.arange(7) == 3, np.nan, motion.positions)))
        with pytest.raises(ValueError, match='the workspace has'):
            workspace.judge(motion.select(JOINT_NAMES[:6]))
        with pytest.raises(ValueError, match='ends before the seam'):
            workspace.judge(motion, T0 + int(motion.times_ns[-1]) + 1)

    def test_a_motion_too_fast_to_follow_counts_as_leaving(self, chain: Chain) -> None:
        workspace = Workspace(JOINT_NAMES, chain, -2 * np.ones(3), 2 * np.ones(3))
        q = np.vstack([HOME, HOME])
        assert workspace.judge(trajectory(q, np.zeros((2, 7)), 1000 * MS)).band is Band.PASS
        for speed in (1e4, 1e200):
            with np.errstate(all='ignore'):
                wild = workspace.judge(trajectory(q, np.full((2, 7), speed), 1000 * MS))
            assert wild.band is Band.CLAMP and wild.until_ns == T0 and 'too fast' in wild.reason


def swing(*angles: float) -> JointTrajectory:
    """From rest at home about the first joint by each of ``angles``, one second each, resting between them."""
    q = [HOME]
    v = [np.zeros(7)]
    for angle in angles:
        s = np.arange(1, 51) / 50
        first = np.eye(7)[0]
        v += [angle * 6 * (x - x * x) * first for x in s]
        q += [q[-1] + angle * (3 * x * x - 2 * x**3) * first for x in s]
    return trajectory(np.array(q), np.array(v))


class TestFit:
    @settings(max_examples=120, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_what_is_sent_ends_at_rest_inside_and_is_never_worse_than_what_was_wanted(self, chain: Chain, seed: int) -> None:
        rng = np.random.default_rng(seed)
        motion = Motion.random(rng)
        workspace = box_around(chain, tips(motion.path.positions[:1])[0], rng, rng.choice([0.0, 0.02]))
        fit = motion.fit(workspace)
        if fit.trajectory is None:
            assert fit.verdict.band is not Band.PASS and fit.verdict.reason
            return
        assert np.all(fit.trajectory.velocities[-1] == 0.0)
        sent, wanted = tips(dense(fit.trajectory)), tips(dense(motion.path))
        assert np.all(excess(workspace, sent) <= excess(workspace, sent[:1]) + TOLERANCE_M)
        assert excess(workspace, sent).max() <= excess(workspace, wanted).max() + TOLERANCE_M
        assert np.all(excess(workspace, sent, 0.0)[-1] <= excess(workspace, sent, 0.0)[0])
        if fit.last_knot is None:
            assert fit.trajectory is motion.path
        else:
            later = range(fit.last_knot + 1, fit.verdict.last_knot + 1)
            assert all(workspace.judge(motion.stop(knot)).band is not Band.PASS for knot in later)
            np.testing.assert_array_equal(fit.trajectory.positions[: fit.last_knot + 1], motion.path.positions[: fit.last_knot + 1])

    @settings(max_examples=120, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_a_larger_box_never_ends_a_motion_earlier(self, chain: Chain, seed: int) -> None:
        rng = np.random.default_rng(seed)
        motion = Motion.random(rng)
        small = box_around(chain, tips(motion.path.positions[:1])[0], rng, rng.choice([0.0, 0.02]))
        grown = rng.uniform(0.0, 0.1, (2, 3)) * (rng.random((2, 3)) < 0.5)
        large = replace(small, lower=small.lower - grown[0], upper=small.upper + grown[1])
        ends = []
        for workspace in (small, large):
            fit = motion.fit(workspace)
            whole = len(motion.path.times_ns)
            ends.append(-1 if fit.trajectory is None else whole if fit.last_knot is None else fit.last_knot)
        assert ends[0] <= ends[1]
        assert small.judge(motion.path).until_ns <= large.judge(motion.path).until_ns

    def test_where_the_wanted_motion_rests_at_a_knot_it_may_end_there(self, chain: Chain) -> None:
        q = HOME + 0.1 * np.arange(6)[:, None] * np.eye(7)[0]
        steps = trajectory(q, np.zeros_like(q), 200 * MS)
        fit = fit_inside(steps, box(chain, 0.2, 0.1), lambda knot: trajectory(q[: knot + 1], np.zeros((knot + 1, 7)), 200 * MS))
        assert fit.verdict.band is Band.CLAMP and fit.last_knot == fit.verdict.last_knot > 0

    def test_a_motion_too_fast_to_stop_inside_is_refused(self, chain: Chain) -> None:
        path = swing(0.8)
        moving = JointTrajectory(T0, JOINT_NAMES, path.times_ns[:-25], path.positions[25:], path.velocities[25:])
        tip = tips(moving.positions[:1])[0]
        limits = JointLimits(JOINT_NAMES, -4 * np.ones(7), 4 * np.ones(7), 2 * np.ones(7), 8 * np.ones(7))
        narrow = Workspace(JOINT_NAMES, chain, tip - 0.5, tip + np.array([0.5, 0.01, 0.5]))
        fit = Motion(limits, moving).fit(narrow)
        assert fit.trajectory is None and fit.verdict.band is Band.CLAMP and 'y = ' in fit.verdict.reason


def test_an_empty_box_is_an_error(chain: Chain) -> None:
    with pytest.raises(ValueError, match=r'is empty with a margin of 0\.2 m'):
        Workspace(JOINT_NAMES, chain, np.zeros(3), np.full(3, 0.3), 0.2)
    with pytest.raises(ValueError, match='is empty'):
        Workspace(JOINT_NAMES, chain, np.zeros(3), np.array([1.0, np.nan, 1.0]))
