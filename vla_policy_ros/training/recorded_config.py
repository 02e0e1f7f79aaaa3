"""The part of the training file that speaks about recorded episodes.

Enters: a mapping of YAML. Leaves: validated sections. Any thread; no network is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vla_policy_ros.episodes.mapping import DatasetMapping
from vla_policy_ros.strict_yaml import Section

Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Augmentation(Section):
    """How far pictures are changed; every picture by its own draw. Zeros and a zoom of 1 change nothing."""

    zoom: tuple[float, float] = Field((1.0, 1.1), description='Smallest and largest scale of the content.')
    shift: Share = Field(0.04, description='Largest move of the content along each axis, as a share of the side.')
    brightness: Share = Field(0.2, description='Levels are multiplied by 1 - this to 1 + this.')
    contrast: Share = Field(0.2, description='Differences from the mean level, likewise.')
    saturation: Share = Field(0.2, description='Differences from grey, likewise.')
    probability: Annotated[float, Field(ge=0.0, le=1.0)] = Field(0.8, description='Share of pictures that are changed at all.')

    @model_validator(mode='after')
    def _ordered(self) -> Augmentation:
        if not 0.1 <= self.zoom[0] <= self.zoom[1] <= 10.0:
            raise ValueError(f'zoom must be two scales from 0.1 to 10, the smaller first, got {list(self.zoom)}')
        return self


class RecordedData(Section):
    """Windows of recorded episodes: LeRobot datasets, bags, or folders of bags."""

    source: Literal['episodes'] = Field(description='`episodes`.')
    path: Path = Field(description='LeRobot dataset, bag, or folder of bags; relative to the working directory.')
    episodes: tuple[int, ...] | None = Field(None, min_length=1, description='Episodes to train on. None: all but the held-out.')
    validation_episodes: tuple[int, ...] = Field((), description='Held-out episodes.')
    mapping: DatasetMapping = Field(default_factory=DatasetMapping, description='Names of a LeRobot dataset that differ.')
    instruction: str | None = Field(None, description='Instead of what is recorded.')
    stride: int = Field(1, gt=0, description='Steps from one window to the next.')
    augmentation: Augmentation | None = Field(None, description='Changes of the training pictures. None: as they are.')
    skip_damaged: bool = Field(False, description='Leave out, and tell, episodes that cannot be read.')

    @model_validator(mode='after')
    def _held_out(self) -> RecordedData:
        both = sorted(set(self.episodes or ()) & set(self.validation_episodes))
        if both:
            raise ValueError(f'episode {both[0]} is both trained on and held out')
        return self
