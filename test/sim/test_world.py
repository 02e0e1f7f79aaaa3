"""The world is reproducible, its cameras are calibrated, and its drives go where they are told."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vla_policy_ros.sim.expert import ArmKinematics, expert_chunk
from vla_policy_ros.sim.scene import (
    CAMERA_SHIFT,
    COLOURS,
    HELD_OUT_KINDS,
    JITTER,
    MIN_SPACING,
    Variation,
    sample_scene,
)
from vla_policy_ros.sim.world import TabletopWorld

ROOT = Path(__file__).parents[2]
CAMERAS = ('scene', 'wrist')


@pytest.fixture(scope='module')
def world():
    world = TabletopWorld()
    yield world
    world.close()


def test_same_seed_same_scene_pixels_and_motion(world):
    def run(seed):
        world.reset(seed)
        images = [world.render(camera).rgb for camera in CAMERAS]
        q, _ = world.joint_state()
        world.set_position_targets(q + 0.1)
        world.step(0.2)
        return [*images, world.joint_state()[0], world.tcp(), world.object_position(world.objects[0].name)]

    first, other, again = run(3), run(4), run(3)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_variation_moves_camera_light_and_surfaces_but_not_the_task():
    plain, jittered = sample_scene(5), sample_scene(5, JITTER)
    assert [replace(o, tint=(0.0, 0.0, 0.0)) for o in jittered.objects] == list(plain.objects)
    assert np.array_equal(plain.start, jittered.start) and plain.fovy == jittered.fovy
    moved = np.abs(jittered.camera_position - plain.camera_position)
    assert 0.0 < moved.max() <= CAMERA_SHIFT and not np.array_equal(plain.camera_axes, jittered.camera_axes)
    assert plain.light != jittered.light and plain.table != jittered.table
    assert all(o.tint == (0.0, 0.0, 0.0) for o in plain.objects) and all(o.tint != (0.0, 0.0, 0.0) for o in jittered.objects)
    shifted = [sample_scene(seed, Variation(camera='shifted', camera_shift=0.02)) for seed in range(50)]
    offsets = np.abs([scene.camera_position - plain.camera_position for scene in shifted])
    assert 0.015 < offsets.max() <= 0.02 and all(np.array_equal(scene.camera_axes, plain.camera_axes) for scene in shifted)


def test_held_out_kinds_appear_only_where_they_are_asked_for():
    assert not any((o.colour, o.shape) in HELD_OUT_KINDS for seed in range(300) for o in sample_scene(seed).objects)
    wanted = [sample_scene(seed, Variation(kinds='held_out')).objects for seed in range(50)]
    assert {(objects[0].colour, objects[0].shape) for objects in wanted} == set(HELD_OUT_KINDS)
    assert not any((o.colour, o.shape) in HELD_OUT_KINDS for objects in wanted for o in objects[1:])


def test_twins_are_the_only_objects_of_one_name():
    for seed in range(50):
        names = [o.name for o in sample_scene(seed, Variation(twins=True)).objects]
        assert names[0] == names[1] != names[2]


def test_shared_colour_can_be_asked_for_and_excluded():
    for wanted in (True, False):
        scenes = [sample_scene(seed, Variation(shared_colour=wanted)) for seed in range(50)]
        assert all((len({o.colour for o in scene.objects}) < 3) == wanted for scene in scenes)


@pytest.mark.parametrize('wrong', [{'kinds': 'all'}, {'camera': 'left'}, {'camera_shift': 1.0}])
def test_unknown_variations_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Variation(**wrong)


def test_objects_are_unique_apart_and_sometimes_share_a_colour():
    shared = 0
    for seed in range(200):
        objects = sample_scene(seed).objects
        assert len({o.name for o in objects}) == 3
        places = np.array([(o.x, o.y) for o in objects])
        gaps = np.linalg.norm(places[:, None] - places[None], axis=-1)[np.triu_indices(3, 1)]
        assert gaps.min() >= MIN_SPACING
        shared += len({o.colour for o in objects}) < 3
    assert 40 < shared < 100


@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize('camera', CAMERAS)
def test_intrinsics_say_where_a_known_point_appears(world, camera, seed):
    """The centre of a ball's silhouette is where K and the camera pose put the ball's centre, within a pixel."""
    errors = []
    for offset in range(40):
        scene = world.reset(1000 * seed + offset)
        for spec in scene.objects:
            pixel = world.visible_pixel(camera, spec.name)
            if spec.shape != 'ball' or pixel is None:
                continue
            mask = _colour_mask(world.render(camera).rgb, spec.colour)
            if sum(o.colour == spec.colour for o in scene.objects) > 1 or _touches_border(mask) or not _is_disc(mask):
                continue
            v, u = np.nonzero(mask)
            # A sphere's silhouette is an ellipse that perspective stretches away from the optical axis by d^2 / depth^2 of the
            # offset; the tolerance of a pixel covers it for these small balls once it is taken out.
            errors.append(np.hypot(*(np.array([u.mean(), v.mean()]) - _silhouette_centre(world, camera, spec))))
        if len(errors) >= 4:
            break
    assert len(errors) >= 2
    assert max(errors) < 1.0, errors


def _colour_mask(rgb, colour):
    """bool ``[H, W]``: pixels of the hue of ``colour``."""
    pixels = rgb.astype(np.float64)
    chroma = pixels - pixels.mean(axis=-1, keepdims=True)
    wanted = np.array(COLOURS[colour]) - np.mean(COLOURS[colour])
    size = np.linalg.norm(chroma, axis=-1)
    return (chroma @ wanted > 0.93 * size * np.linalg.norm(wanted)) & (size > 0.35 * pixels.max(axis=-1)) & (size > 15)


def _touches_border(mask):
    return bool(mask[[0, -1]].any() or mask[:, [0, -1]].any())


def _is_disc(mask):
    """Whether the mask is one full ellipse, i.e. nothing hides a part of the ball."""
    v, u = np.nonzero(mask)
    if len(v) < 60:
        return False
    return abs(len(v) - np.pi / 4 * (np.ptp(u) + 1) * (np.ptp(v) + 1)) < 0.06 * len(v)


def _silhouette_centre(world, camera, spec):
    """Centre of the ellipse that a pinhole camera makes of a sphere: the sphere's direction, scaled by its distances."""
    rotation, position = world.camera_pose(camera)
    x, y, z = rotation.T @ (world.object_position(spec.name) - position)
    stretch = z / (z * z - spec.size[0] ** 2)
    K = world.intrinsics(camera)
    return np.array([K[0, 0] * x * stretch + K[0, 2], K[1, 1] * y * stretch + K[1, 2]])


def test_intrinsics_follow_the_image_size_and_the_scene(world):
    world.reset(0)
    full, half = world.intrinsics('scene'), world.intrinsics('scene', 320, 240)
    assert half[0, 0] == pytest.approx(full[0, 0] / 2)
    # The centre of pixel 0 of the half image is between pixels 0 and 1 of the full one.
    assert 2 * half[0, 2] + 0.5 == pytest.approx(full[0, 2])
    view = world.render('scene', 320, 240)
    assert view.rgb.shape == (240, 320, 3) and np.array_equal(view.K, half)
    world.reset(1)
    assert world.intrinsics('scene')[0, 0] != full[0, 0]


def test_drives_follow_a_moving_target_closely(world):
    world.reset(7)
    q, _ = world.joint_state()
    velocity = np.array([0.5, -0.3, 0.4, 0.5, -0.5, 0.4, 0.6])
    worst = 0.0
    for tick in range(1, 60):
        ramp = min(1.0, tick / 20)  # 2.5 to 3 rad/s^2 up to speed
        q = q + velocity * ramp * 0.01
        world.set_position_targets(q, velocity * ramp)
        world.step(0.01)
        worst = max(worst, np.abs(world.joint_state()[0] - q).max())
    assert worst < 0.01


def test_an_untouched_world_stays_at_rest(world):
    world.reset(11)
    start = [world.object_position(o.name) for o in world.objects]
    q, _ = world.joint_state()
    world.step(2.0)
    assert np.abs(world.joint_state()[0] - q).max() < 1e-3
    for before, spec in zip(start, world.objects, strict=True):
        assert np.linalg.norm(world.object_position(spec.name) - before) < 2e-3, spec.name
    assert world.time_ns == 2_000_000_000


def test_fingers_push_an_object(world):
    world.reset(2)
    spec = world.objects[0]
    before = world.object_position(spec.name)
    kinematics = ArmKinematics()
    beside = before + np.array([-0.08, 0.0, 0.01])
    world.set_arm(expert_chunk(kinematics, world.joint_state()[0], beside, 60, 0.1)[-1])
    assert np.linalg.norm(world.tcp() - beside) < 0.005
    for forward in np.arange(0.01, 0.12, 0.01):  # small goals, so that the expert does not rise on its way
        for target in expert_chunk(kinematics, world.joint_state()[0], beside + np.array([forward, 0.0, 0.0]), 10, 0.02):
            world.set_position_targets(target)
            world.step(0.02)
    moved = world.object_position(spec.name) - before
    assert moved[0] > 0.02


def test_laying_out_a_scene_leaves_arm_and_time_alone(world):
    world.reset(1)
    q, _ = world.joint_state()
    world.set_position_targets(q + 0.2)
    world.step(0.1)
    q, v = world.joint_state()
    world.lay_out(sample_scene(2))
    assert np.array_equal(world.joint_state()[0], q) and np.array_equal(world.joint_state()[1], v)
    assert world.time_ns == 100_000_000
    assert world.objects == sample_scene(2).objects


def test_bad_calls_are_named(world):
    world.reset(0)
    with pytest.raises(KeyError, match="no camera 'left'"):
        world.render('left')
    with pytest.raises(KeyError, match="no object 'pink cube'"):
        world.goal_point('pink cube')
    with pytest.raises(ValueError, match='7 finite numbers'):
        world.set_position_targets(np.array([0.0] * 6 + [np.nan]))
    with pytest.raises(ValueError, match='whole number of physics steps'):
        world.step(0.003)
    with pytest.raises(ValueError, match='larger than the world was made for'):
        world.render('scene', 1280, 960)


@pytest.mark.parametrize('backend', ['osmesa', 'disabled'])
def test_without_an_opengl_library_the_error_names_the_remedy(backend):
    """A process of its own: the library is loaded when mujoco is first imported."""
    code = "from vla_policy_ros.sim.world import TabletopWorld; TabletopWorld().render('scene')"
    hide = 'import ctypes.util; ctypes.util.find_library = lambda name: None; '
    result = subprocess.run(
        [sys.executable, '-c', hide + code],
        env=os.environ | {'MUJOCO_GL': backend}, cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert f"cannot draw with MUJOCO_GL='{backend}'" in last and 'install libegl1' in last, result.stderr
