"""Local folders of public checkpoints, read tensor by tensor."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_SUFFIX = '.safetensors.index.json'
PICKLED = ('*.bin', '*.pt', '*.pth', '*.ckpt')


class WeightsError(ValueError):
    """Weights cannot be used; the message says which and what to do about it."""


@dataclass(frozen=True)
class SourceTensor:
    """Where one tensor of a source lies, and its shape."""

    file: Path
    shape: tuple[int, ...]


class Source:
    """One folder with safetensors files, and what it says about itself.

    Attributes:
        path: the folder.
        tensors: name to place and shape; read from the files' headers, no data.
        config: the folder's ``config.json``, or an empty dict.
        licence: what the front matter of the folder's ``README.md`` states as its license, or None.

    Raises:
        WeightsError: the folder holds no readable safetensors, misses a shard that its index names, or has a tensor twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise WeightsError(f'{self.path} is not a folder; give the local folder of a checkpoint')
        self.tensors: dict[str, SourceTensor] = {}
        for file in self._files():
            self._read_header(file)
        self.config = self._json('config.json')
        self.licence = _stated_licence(self.path / 'README.md')

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(file.stat().st_size for file in {tensor.file for tensor in self.tensors.values()})

    def get(self, name: str) -> Tensor:
        """One tensor, in the dtype of its file. Raises WeightsError where its bytes cannot be read."""
        place = self.tensors[name]
        try:
            with safe_open(place.file, framework='pt') as handle:
                return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f'{place.file}: {name} cannot be read ({error}); copy the file again') from error

    def _files(self) -> list[Path]:
        files = sorted(self.path.glob('*.safetensors'))
        indexed: set[str] = set()
        for index in sorted(self.path.glob(f'*{INDEX_SUFFIX}')):
            named = set(self._json(index.name).get('weight_map', {}).values())
            missing = sorted(name for name in named if not (self.path / name).is_file())
            if missing:
                raise WeightsError(f'{self.path} lacks {missing[0]}, which {index.name} names; copy the whole folder')
            indexed |= named
        if indexed:
            # Some folders hold the same weights a second time, in one file and under other names.
            return [file for file in files if file.name in indexed]
        if files:
            return files
        pickled = sorted(file.name for pattern in PICKLED for file in self.path.glob(pattern))
        hint = f' (it has {pickled[0]}, which would have to be unpickled: save it as safetensors first)' if pickled else ''
        raise WeightsError(f'{self.path} has no .safetensors files{hint}')

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework='pt') as handle:
                found = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise WeightsError(f'{file} is damaged or was copied only in part ({error}); copy it again') from error
        twice = sorted(found.keys() & self.tensors.keys())
        if twice:
            raise WeightsError(f'{twice[0]} is both in {self.tensors[twice[0]].file.name} and in {file.name}; keep one of them')
        self.tensors |= {name: SourceTensor(file, shape) for name, shape in found.items()}

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not file.is_file():
            return {}
        try:
            data = json.loads(file.read_text(encoding='utf-8'))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise WeightsError(f'{file} is not JSON ({error}); copy it again') from error
        if not isinstance(data, dict):
            raise WeightsError(f'{file} does not hold a JSON object; copy it again')
        return data


def _stated_licence(readme: Path) -> str | None:
    """The ``license`` of a model card's front matter (``license_name`` where that is ``other``)."""
    if not readme.is_file():
        return None
    front = re.match(r'---\s*\n(.*?)\n---', readme.read_text(encoding='utf-8', errors='replace'), re.DOTALL)
    if front is None:
        return None
    stated = dict(re.findall(r'^(license|license_name):[ \t]*["\']?([^"\'\n]+?)["\']?[ \t]*$', front[1], re.MULTILINE))
    return stated.get('license_name') or stated.get('license')
