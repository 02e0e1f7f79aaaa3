"""The simulated tabletop: physics, cameras and the success measure.

`TabletopWorld` steps a position-driven arm and free objects with MuJoCo at a fixed physics step, and renders what a real camera
would deliver: RGB images with the pinhole matrix that holds for them. Time is simulated: it advances only in `step`.

Enters: scene seeds and joint position targets. Leaves: `CameraView`s, joint states, distances. One thread: the one that created
the world, because the OpenGL context of its renderer belongs to it. Units and frames as in `mjcf`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.sim.engine import mujoco
from vla_policy_ros.sim.mjcf import CAMERA_NAMES, FINGER_JOINTS, FINGER_OPEN, JOINT_NAMES, OBJECT_SLOTS, TIMESTEP, tabletop_xml
from vla_policy_ros.sim.renderer import OffscreenRenderer
from vla_policy_ros.sim.scene import COLOURS, NOMINAL, ObjectSpec, Scene, Variation, sample_scene
from vla_policy_ros.types import NS_PER_S, CameraView

IMAGE_WIDTH, IMAGE_HEIGHT = 640, 480
GOAL_CLEARANCE = 0.01
SUCCESS_DISTANCE = 0.03

_TIMESTEP_NS = round(TIMESTEP * NS_PER_S)
_GEOM_TYPES = {
    'cube': mujoco.mjtGeom.mjGEOM_BOX,
    'ball': mujoco.mjtGeom.mjGEOM_SPHERE,
    'cylinder': mujoco.mjtGeom.mjGEOM_CYLINDER,
}


class TabletopWorld:
    """A 7-joint arm over a table with three objects. Call `reset` first (the constructor resets to seed 0).

    Attributes:
        model, data: the MuJoCo model and state; read them, but change them through the methods only.
        scene: the scene of the last reset.
        joint_names: the joints that are driven: J of them, the seven of the arm first.
    """

    camera_names = CAMERA_NAMES

    def __init__(self, width: int = IMAGE_WIDTH, height: int = IMAGE_HEIGHT, *, gripper: bool = False) -> None:
        """``width`` and ``height`` are the default and largest image size, pixels.

        With a ``gripper`` the fingers are one more joint.
        """
        self.width, self.height = width, height
        self.model = mujoco.MjModel.from_xml_string(tabletop_xml(gripper=gripper))
        self.data = mujoco.MjData(self.model)
        self._lag = -self.model.actuator_biasprm[:, 2] / self.model.actuator_gainprm[:, 0]
        self._renderer: OffscreenRenderer | None = None
        self._camera_ids = {name: self.model.camera(name).id for name in CAMERA_NAMES}
        self._object_bodies = [self.model.body(f'object{slot}').id for slot in range(OBJECT_SLOTS)]
        self._object_geoms = [self.model.geom(f'object{slot}').id for slot in range(OBJECT_SLOTS)]
        self._object_qpos = [int(self.model.joint(f'object{slot}').qposadr[0]) for slot in range(OBJECT_SLOTS)]
        self._tcp = self.model.site('tcp').id
        self.joint_names = (*JOINT_NAMES, FINGER_JOINTS[0]) if gripper else JOINT_NAMES
        # The second finger does what the first one does.
        self._driven = np.array([*range(len(JOINT_NAMES)), *([7, 7] if gripper else [])])
        names = (*JOINT_NAMES, *FINGER_JOINTS) if gripper else JOINT_NAMES
        self._qpos, self._qvel = (
            np.array([int(getattr(self.model.joint(name), kind)[0]) for name in names]) for kind in ('qposadr', 'dofadr')
        )
        self._lamp = self.model.light('lamp').id
        self._zone = self.model.geom('zone').id
        self._table_material = self.model.material('table').id
        self._nominal_light = (self.model.light_diffuse.copy(), self.model.light_dir.copy())
        self._steps = 0
        self.scene: Scene = self.reset(0)

    # -- episodes -------------------------------------------------------------------------------------------------------------

    def reset(self, seed: int, variation: Variation = NOMINAL) -> Scene:
        """Start the scene drawn from ``seed`` (see `sample_scene`) at time 0, arm at rest, and return it."""
        return self.reset_to(sample_scene(seed, variation))

    def reset_to(self, scene: Scene) -> Scene:
        """Start a given scene at time 0 with the arm at rest at its start pose."""
        mujoco.mj_resetData(self.model, self.data)
        self._steps = 0
        self.lay_out(scene)
        self.set_arm(scene.start)
        return scene

    def lay_out(self, scene: Scene) -> None:
        """Put down the objects of ``scene`` and set its camera and light; time goes on, and the arm stays as it moves."""
        for slot, spec in enumerate(scene.objects):
            self._place(slot, spec)
        camera = self._camera_ids['scene']
        self.model.cam_pos[camera] = scene.camera_position
        self.model.cam_fovy[camera] = scene.fovy
        mujoco.mju_mat2Quat(self.model.cam_quat[camera], scene.camera_axes.ravel())
        diffuse, direction = self._nominal_light
        gain, dx, dy = scene.light
        self.model.light_diffuse[:] = diffuse * gain
        self.model.light_dir[self._lamp] = direction[self._lamp] + [dx, dy, 0.0]
        self.model.mat_rgba[self._table_material] = [*scene.table, 1.0]
        zone = scene.zone
        self.model.geom_pos[self._zone] = [0.5, 0.0, -1.0] if zone is None else [zone.x, zone.y, 0.0006]
        if zone is not None:
            self.model.geom_rgba[self._zone] = [*COLOURS[zone.colour], 1.0]
        self.scene = scene
        mujoco.mj_forward(self.model, self.data)

    def set_arm(self, positions: NDArray[np.float64], finger: float = FINGER_OPEN) -> None:
        """Teleport the arm to ``positions [7]`` at rest, with the drives holding it there; objects stay.

        ``finger`` is where the fingers of a gripper go, m.
        """
        whole = np.append(positions, finger)[self._driven]
        self.data.qpos[self._qpos] = whole
        self.data.qvel[self._qvel] = 0.0
        self.data.ctrl[:] = whole
        mujoco.mj_forward(self.model, self.data)

    def put_objects(self, places: NDArray[np.float64]) -> None:
        """Move the objects' centres to ``places [slots, 3]`` (m), at rest and turned as they were laid out."""
        for slot, place in enumerate(places):
            address, dof = self._object_qpos[slot], int(self.model.body_dofadr[self._object_bodies[slot]])
            self.data.qpos[address : address + 3] = place
            self.data.qvel[dof : dof + 6] = 0.0
        mujoco.mj_forward(self.model, self.data)

    def _place(self, slot: int, spec: ObjectSpec) -> None:
        """Turn slot ``slot`` into the object ``spec`` and lay it on the table."""
        model, geom, body = self.model, self._object_geoms[slot], self._object_bodies[slot]
        size = np.array(spec.size)
        half = np.array({'cube': size, 'ball': size[[0, 0, 0]], 'cylinder': size[[0, 0, 1]]}[spec.shape])
        model.geom_type[geom] = _GEOM_TYPES[spec.shape]
        model.geom_size[geom] = size
        model.geom_rbound[geom] = size[0] if spec.shape == 'ball' else np.linalg.norm(half)
        model.geom_aabb[geom] = [0.0, 0.0, 0.0, *half]
        model.geom_rgba[geom] = [*spec.rgb, 1.0]
        # The inertia of a box that encloses the shape: near enough for things that are pushed and lifted slowly.
        mass = model.body_mass[body]
        model.body_inertia[body] = mass / 3.0 * (np.sum(half**2) - half**2)
        address = self._object_qpos[slot]
        self.data.qpos[address : address + 3] = [spec.x, spec.y, spec.half_height]
        self.data.qpos[address + 3 : address + 7] = [np.cos(spec.yaw / 2), 0.0, 0.0, np.sin(spec.yaw / 2)]
        dof = int(self.model.body_dofadr[body])
        self.data.qvel[dof : dof + 6] = 0.0

    # -- the arm --------------------------------------------------------------------------------------------------------------

    @property
    def time_ns(self) -> int:
        """Simulated time since the reset, ns."""
        return self._steps * _TIMESTEP_NS

    def joint_state(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Measured positions ``[J]`` in rad (the fingers' in m) and velocities ``[J]``, in the order of `joint_names`."""
        count = len(self.joint_names)
        return self.data.qpos[self._qpos[:count]].copy(), self.data.qvel[self._qvel[:count]].copy()

    def joint_efforts(self) -> NDArray[np.float64]:
        """Torques ``[J]`` of the drives, N m (without the gravity compensation; the fingers' are forces, N)."""
        return np.array(self.data.qfrc_actuator[self._qvel[: len(self.joint_names)]])

    def set_position_targets(self, positions: NDArray[np.float64], velocities: NDArray[np.float64] | None = None) -> None:
        """Give the drives position targets ``[J]``; ``velocities [J]`` feed the damping forward, which removes most of the lag.

        Raises:
            ValueError: wrong shape or a value that is not finite.
        """
        targets = np.asarray(positions, dtype=np.float64)
        feed = np.zeros_like(targets) if velocities is None else np.asarray(velocities, dtype=np.float64)
        wanted = (len(self.joint_names),)
        if targets.shape != wanted or feed.shape != wanted or not (np.isfinite(targets).all() and np.isfinite(feed).all()):
            raise ValueError(
                f'position targets must be {wanted[0]} finite numbers, got {positions!r} with velocities {velocities!r}'
            )
        self.data.ctrl[:] = targets[self._driven] + self._lag * feed[self._driven]

    def step(self, dt: float) -> None:
        """Advance simulated time by ``dt`` seconds, a whole number of physics steps of `mjcf.TIMESTEP`. Raises ValueError
        otherwise."""
        count = round(dt / TIMESTEP)
        if count < 1 or abs(count * TIMESTEP - dt) > 1e-9:
            raise ValueError(f'step of {dt} s is not a whole number of physics steps of {TIMESTEP} s')
        mujoco.mj_step(self.model, self.data, nstep=count)
        self._steps += count

    # -- the task -------------------------------------------------------------------------------------------------------------

    @property
    def objects(self) -> tuple[ObjectSpec, ...]:
        """The objects of the scene; positions in it are the initial ones, `object_position` has the current ones."""
        return self.scene.objects

    def tcp(self) -> NDArray[np.float64]:
        """Tool centre point ``[3]`` between the finger tips, m."""
        return np.array(self.data.site_xpos[self._tcp])

    def object_position(self, which: str | int) -> NDArray[np.float64]:
        """Current centre ``[3]`` of an object, by name or by slot, m. Raises KeyError for one the scene does not have."""
        return np.array(self.data.geom_xpos[self._object_geoms[self._slot(which)]])

    def goal_point(self, which: str | int) -> NDArray[np.float64]:
        """Where the tool should go for an object: `GOAL_CLEARANCE` above its top, ``[3]`` m. Raises KeyError."""
        slot = self._slot(which)
        goal = self.object_position(slot)
        goal[2] += self.scene.objects[slot].half_height + GOAL_CLEARANCE
        return goal

    def distance(self, which: str | int) -> float:
        """Distance from the tool to the goal point of an object, m. Raises KeyError."""
        return float(np.linalg.norm(self.tcp() - self.goal_point(which)))

    def success(self, which: str | int, threshold: float = SUCCESS_DISTANCE) -> bool:
        """Whether the tool is within ``threshold`` m of the goal point of an object. Raises KeyError."""
        return self.distance(which) < threshold

    def _slot(self, which: str | int) -> int:
        """Twins share a name, which then means the first of them; a slot is never ambiguous."""
        for slot, spec in enumerate(self.scene.objects):
            if which in (slot, spec.name):
                return slot
        raise KeyError(f'no object {which!r} in the scene; it has {", ".join(spec.name for spec in self.scene.objects)}')

    # -- the cameras ----------------------------------------------------------------------------------------------------------

    def intrinsics(self, camera: str, width: int | None = None, height: int | None = None) -> NDArray[np.float64]:
        """Pinhole matrix ``[3, 3]`` of a camera for an image size, in the ROS convention: integer coordinates are pixel
        centres, so the optical axis is at ``((width - 1) / 2, (height - 1) / 2)``. Raises KeyError for an unknown camera."""
        width, height = width or self.width, height or self.height
        focal = height / 2 / np.tan(np.deg2rad(self.model.cam_fovy[self._camera(camera)]) / 2)
        return np.array([[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]])

    def camera_pose(self, camera: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Rotation ``[3, 3]`` and position ``[3]`` of the optical frame (x right, y down, z forward) in the world."""
        index = self._camera(camera)
        axes = self.data.cam_xmat[index].reshape(3, 3)
        return axes * [1.0, -1.0, -1.0], self.data.cam_xpos[index].copy()

    def project(self, camera: str, point: NDArray[np.float64]) -> tuple[float, float] | None:
        """Pixel ``(u, v)`` of a world point in a default-size image, or None where it is behind the camera or out of frame."""
        rotation, position = self.camera_pose(camera)
        in_camera = rotation.T @ (np.asarray(point) - position)
        if in_camera[2] <= 0.0:
            return None
        u, v, _ = self.intrinsics(camera) @ (in_camera / in_camera[2])
        inside = -0.5 <= u < self.width - 0.5 and -0.5 <= v < self.height - 0.5
        return (float(u), float(v)) if inside else None

    def visible_pixel(self, camera: str, which: str | int) -> tuple[float, float] | None:
        """Pixel of the centre of an object where the camera sees that very object there, else None. Raises KeyError."""
        slot = self._slot(which)
        return self._seen(camera, self.object_position(slot), self._object_geoms[slot])

    def visible_zone(self, camera: str) -> tuple[float, float] | None:
        """Pixel of the zone's centre where the camera sees the zone there; None also in a scene without one."""
        return None if self.scene.zone is None else self._seen(camera, self.zone_position(), self._zone)

    def zone_position(self) -> NDArray[np.float64]:
        """Centre ``[3]`` of the zone, m. Raises KeyError in a scene without one."""
        if self.scene.zone is None:
            raise KeyError(f'scene {self.scene.seed} has no zone')
        return np.array(self.data.geom_xpos[self._zone])

    def _seen(self, camera: str, centre: NDArray[np.float64], geom: int) -> tuple[float, float] | None:
        pixel = self.project(camera, centre)
        if pixel is None:
            return None
        position = self.data.cam_xpos[self._camera(camera)]
        hit = np.full(1, -1, dtype=np.int32)
        mujoco.mj_ray(self.model, self.data, position, centre - position, None, 1, -1, hit)
        return pixel if int(hit[0]) == geom else None

    def render(self, camera: str, width: int | None = None, height: int | None = None) -> CameraView:
        """Render a camera: RGB uint8 ``[height, width, 3]``, its intrinsics and the simulated time as stamp.

        Raises:
            KeyError: unknown camera.
            ValueError: larger than the world's image size.
            RenderError: no OpenGL context can be had here.
        """
        index = self._camera(camera)
        width, height = width or self.width, height or self.height
        if width > self.width or height > self.height:
            raise ValueError(f'image of {width} x {height} is larger than the world was made for, {self.width} x {self.height}')
        if self._renderer is None:
            self._renderer = OffscreenRenderer(self.model, self.width, self.height)
        return CameraView(
            self._renderer.render(self.data, index, width, height), self.intrinsics(camera, width, height), self.time_ns
        )

    def render_depth(self, camera: str, width: int, height: int) -> NDArray[np.float32]:
        """Depth ``[height, width]`` in m along the optical axis, at the pixel centres of a small image. Raises as `render`."""
        if self._renderer is None:
            self._renderer = OffscreenRenderer(self.model, self.width, self.height)
        return self._renderer.depth(self.data, self._camera(camera), width, height)

    def close(self) -> None:
        """Free the OpenGL context; the next `render` makes a new one."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _camera(self, camera: str) -> int:
        if camera not in self._camera_ids:
            raise KeyError(f'no camera {camera!r} in the simulated world; it has {", ".join(self._camera_ids)}')
        return int(self._camera_ids[camera])
