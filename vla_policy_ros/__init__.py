"""A 3D vision-language-action policy as a ROS 2 node.

The rooms of this package and what each may import are listed in ``docs/architecture.md``, and enforced by
``test/test_architecture.py``.
"""

__version__ = '0.1.0'
