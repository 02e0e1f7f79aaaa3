"""The MuJoCo description of the tabletop: a 7-joint arm of primitive shapes, a table, three object slots and two cameras.

The arm has the link offsets and joint limits of a Franka arm and its joint names, so that its URDF displays our joint states.
It is drawn from primitives because a mesh arm costs 3 to 40 times more to render in software. World frame: origin at the
arm's base, x forward over the table, z up, table top at z = 0. Lengths m, angles rad.

Enters: nothing. Leaves: XML text. Any thread.
"""

from __future__ import annotations

JOINT_NAMES = tuple(f'panda_joint{i}' for i in range(1, 8))
FINGER_JOINTS = ('panda_finger_joint1', 'panda_finger_joint2')
FINGER_OPEN = 0.04
OBJECT_SLOTS = 3
CAMERA_NAMES = ('scene', 'wrist')
TIMESTEP = 0.002

_ARM = """
    <body name="base" childclass="arm">
      <geom type="box" pos="-.03 0 .012" size=".12 .1 .012" mass="2" material="dark"/>
      <geom type="cylinder" fromto="0 0 .02 0 0 .15" size=".08" mass="2"/>
      <geom type="cylinder" fromto="0 0 .15 0 0 .16" size=".074" mass=".1" material="accent"/>
      <body name="link1" pos="0 0 .333">
        <joint name="panda_joint1" range="-2.8973 2.8973"/>
        <geom type="cylinder" fromto="0 0 -.173 0 0 -.03" size=".07" mass="2"/>
        <geom type="cylinder" fromto="0 -.078 0 0 .078 0" size=".066" mass="1" material="dark"/>
        <body name="link2" euler="-1.5707963 0 0">
          <joint name="panda_joint2" range="-1.7628 1.7628"/>
          <geom type="sphere" size=".072" mass=".5"/>
          <geom type="capsule" fromto="0 -.04 0 0 -.2 0" size=".062" mass="2"/>
          <geom type="cylinder" fromto="0 -.2 0 0 -.262 0" size=".063" mass=".3" material="dark"/>
          <body name="link3" pos="0 -.316 0" euler="1.5707963 0 0">
            <joint name="panda_joint3" range="-2.8973 2.8973"/>
            <geom type="cylinder" fromto="0 0 -.054 0 0 0" size=".06" mass="1"/>
            <geom type="capsule" fromto="0 0 -.005 .0825 0 0" size=".056" mass="1"/>
            <geom type="cylinder" fromto=".0825 -.065 0 .0825 .065 0" size=".05" mass=".4" material="dark"/>
            <body name="link4" pos=".0825 0 0" euler="1.5707963 0 0">
              <joint name="panda_joint4" range="-3.0718 -.0698"/>
              <geom type="sphere" size=".056" mass=".4"/>
              <geom type="capsule" fromto="-.01 .01 0 -.0825 .09 0" size=".052" mass="1.6"/>
              <geom type="cylinder" fromto="-.0825 .1 0 -.0825 .135 0" size=".055" mass=".3" material="dark"/>
              <body name="link5" pos="-.0825 .384 0" euler="-1.5707963 0 0">
                <joint name="panda_joint5" range="-2.8973 2.8973"/>
                <geom type="capsule" fromto="0 0 -.23 0 .02 -.12" size=".052" mass="1.2"/>
                <geom type="capsule" fromto="0 .02 -.12 0 0 -.03" size=".046" mass=".8"/>
                <geom type="cylinder" fromto="0 -.06 0 0 .06 0" size=".047" mass=".4" material="dark"/>
                <body name="link6" euler="1.5707963 0 0">
                  <joint name="panda_joint6" range="-.0175 3.7525"/>
                  <geom type="sphere" size=".05" mass=".4"/>
                  <geom type="capsule" fromto="0 0 0 .088 0 0" size=".045" mass=".9"/>
                  <body name="link7" pos=".088 0 0" euler="1.5707963 0 0">
                    <joint name="panda_joint7" range="-2.8973 2.8973"/>
                    <geom type="cylinder" fromto="0 0 -.052 0 0 .075" size=".046" mass=".5"/>
                    <geom type="cylinder" fromto="0 0 .075 0 0 .107" size=".036" mass=".2" material="dark"/>
                    <body name="hand" pos="0 0 .107" euler="0 0 -.78539816">
                      <geom class="hand" type="box" pos="0 0 .034" size=".026 .098 .03" mass=".5" material="white"/>
                      <geom class="hand" type="box" pos="0 0 .066" size=".018 .09 .004" mass=".05" material="dark"/>
                      {fingers}
                      <geom type="box" pos=".062 0 .02" size=".014 .045 .012" mass=".08" material="dark"/>
                      <geom type="box" pos=".04 0 .02" size=".02 .015 .006" mass=".02" material="dark"/>
                      <site name="tcp" pos="0 0 .1034" size=".004" group="4"/>
                      <camera name="wrist" pos=".062 0 .034" xyaxes="0 1 0 .9744 0 .225" fovy="78"/>
                    </body>
                  </body>
                </body>
              </body>
            </body>
          </body>
        </body>
      </body>
    </body>
"""

# Together they are a pusher. Wider apart, they would take the corner of a cube between them, and push it no further.
_FIXED_FINGERS = """
                      <geom class="hand" type="box" pos="0 .009 .083" size=".011 .008 .0205" mass=".03"/>
                      <geom class="hand" type="box" pos="0 -.009 .083" size=".011 .008 .0205" mass=".03"/>
"""

# The joint's position is the distance from the middle to the inner face of its finger, as a Franka hand reports it.
_SLIDING_FINGER = """
                      <body name="{name}" pos="0 {side}.008 .083">
                        <joint name="{name}" type="slide" axis="0 {side}1 0" range="0 .04" armature=".1" damping="2"/>
                        <geom class="hand" type="box" size=".011 .008 .0205" mass=".03" friction="1.2 .01 .001" condim="6"/>
                      </body>
"""
_FINGER_DRIVE = (1500, 60, 25)

_TABLE = """
    <geom name="table" type="box" pos=".3 0 -.02" size=".55 .65 .02" material="table" contype="1" conaffinity="3"/>
    <geom type="box" pos=".3 0 -.041" size=".556 .656 .006" material="edge" contype="0" conaffinity="0"/>
    <geom type="cylinder" fromto="-.17 -.57 -.72 -.17 -.57 -.04" size=".03" material="edge" contype="0" conaffinity="0"/>
    <geom type="cylinder" fromto="-.17 .57 -.72 -.17 .57 -.04" size=".03" material="edge" contype="0" conaffinity="0"/>
    <geom type="cylinder" fromto=".77 -.57 -.72 .77 -.57 -.04" size=".03" material="edge" contype="0" conaffinity="0"/>
    <geom type="cylinder" fromto=".77 .57 -.72 .77 .57 -.04" size=".03" material="edge" contype="0" conaffinity="0"/>
"""

_OBJECT = """
    <body name="object{slot}" pos="{x} 0 .03">
      <freejoint name="object{slot}"/>
      <geom name="object{slot}" type="sphere" size=".025" mass=".08" contype="1" conaffinity="3" condim="6"
            friction=".8 .005 .002" solref=".006 1"/>
    </body>
"""

# Stiffness (N m / rad), damping (N m s / rad) and the hardware's torque limit (N m) per joint. Gravity is compensated, so the
# drives only accelerate the links; damping / stiffness is the lag in seconds that remains without velocity feed-forward.
_DRIVES = ((9000, 220, 87), (9000, 220, 87), (7000, 150, 87), (7000, 130, 87), (3500, 45, 12), (3500, 45, 12), (2500, 25, 12))


def tabletop_xml(arm_only: bool = False, gripper: bool = False) -> str:
    """The MJCF text. ``arm_only`` leaves out table, objects, scene camera and lights: the model that kinematics needs.

    With a ``gripper`` the two fingers slide, each on its own drive; without, they are fixed, nearly closed.
    """
    objects = '' if arm_only else ''.join(_OBJECT.format(slot=slot, x=0.4 + 0.1 * slot) for slot in range(OBJECT_SLOTS))
    drives_of = dict(zip(JOINT_NAMES, _DRIVES, strict=True)) | (dict.fromkeys(FINGER_JOINTS, _FINGER_DRIVE) if gripper else {})
    drives = '\n'.join(
        f'    <position name="{name}" joint="{name}" kp="{kp}" kv="{kv}" forcerange="-{force} {force}"/>'
        for name, (kp, kv, force) in drives_of.items()
    )
    fingers = _FIXED_FINGERS
    if gripper:
        fingers = ''.join(_SLIDING_FINGER.format(name=name, side=side) for name, side in zip(FINGER_JOINTS, ('', '-'), strict=True))
    arm = _ARM.replace('{fingers}', fingers).replace('<body ', '<body gravcomp="1" ')
    surroundings = '' if arm_only else _SURROUNDINGS + _floor() + _TABLE + objects
    return f"""
<mujoco model="tabletop">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{TIMESTEP}" integrator="implicitfast" cone="elliptic" impratio="{3 if gripper else 1}">
    <flag midphase="disable" nativeccd="enable"/>
  </option>
  <statistic extent="1" center=".3 0 .2"/>
  <visual>
    <quality offsamples="0" shadowsize="0" numslices="20" numstacks="10"/>
    <headlight ambient=".32 .32 .34" diffuse=".28 .28 .28" specular=".1 .1 .1"/>
    <map znear=".02" zfar="20"/>
  </visual>
  <default>
    <default class="arm">
      <geom contype="0" conaffinity="0" material="white"/>
      <joint type="hinge" axis="0 0 1" armature=".12" damping=".5"/>
      <default class="hand"><geom contype="2" conaffinity="1" material="dark" friction=".8"/></default>
    </default>
  </default>
  <asset>
    <texture name="sky" type="skybox" builtin="gradient" rgb1=".86 .89 .93" rgb2=".55 .62 .72" width="64" height="256"/>
    <material name="floor" rgba=".38 .41 .45 1" specular="0"/>
    <material name="tile" rgba=".46 .49 .53 1" specular="0"/>
    <material name="table" rgba=".64 .60 .55 1" specular=".05"/>
    <material name="edge" rgba=".34 .30 .27 1" specular=".1"/>
    <material name="white" rgba=".93 .94 .95 1" specular=".45" shininess=".55"/>
    <material name="dark" rgba=".20 .21 .24 1" specular=".3" shininess=".4"/>
    <material name="accent" rgba=".30 .62 .70 1" specular=".3"/>
  </asset>
  <worldbody>{surroundings}{arm}  </worldbody>
  <actuator>
{drives}
  </actuator>
</mujoco>
"""


_SURROUNDINGS = """
    <light name="lamp" pos=".6 -.8 1.8" dir="-.15 .4 -1" directional="true" castshadow="false"
           diffuse=".5 .5 .48" specular=".3 .3 .3"/>
    <light name="fill" pos="0 1 1.5" dir=".3 -.6 -1" directional="true" castshadow="false"
           diffuse=".2 .2 .22" specular="0 0 0"/>
    <camera name="scene" pos="1 0 1"/>
    <geom name="zone" type="cylinder" pos=".5 0 -1" size=".05 .0006" rgba=".5 .5 .5 1" contype="0" conaffinity="0"/>
"""


def _floor() -> str:
    """A checker floor of flat tiles: in software rendering, untextured tiles cost a third of a textured plane."""
    geoms = ['<geom name="floor" type="plane" pos="0 0 -.72" size="5 5 .1" material="floor" contype="0" conaffinity="0"/>']
    for i in range(-4, 2):
        for j in range(-3, 4):
            if (i + j) % 2 == 0:
                place = f'pos="{0.8 * i + 0.3:.2f} {0.8 * j:.2f} -.71"'
                geoms.append(f'<geom type="box" {place} size=".4 .4 .0005" material="tile" contype="0" conaffinity="0"/>')
    return '\n'.join(geoms)
