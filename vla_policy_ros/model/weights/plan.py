"""Where every tensor of a network comes from, decided from names and shapes alone, before any data is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from vla_policy_ros.model.weights.rules import GEOMETRY, LANGUAGE, PROJECTOR, VISION, translate
from vla_policy_ros.model.weights.sources import Source, WeightsError

MAIN_PART = {'language': LANGUAGE, 'vision': VISION, 'geometry': GEOMETRY}
# Only a CLIP tower has a class token.
CLIP_ONLY = 'embeddings.class_embedding'
SHOWN = 8


@dataclass(frozen=True)
class Origin:
    """A tensor of a source: the part whose folder holds it, and its name there."""

    part: str
    name: str


@dataclass
class Report:
    """What became of every tensor.

    Attributes:
        loaded: our name to where it comes from.
        random: our names that no folder provides.
        left_out: (part, source name, reason).
        sizes: lines about sizes that were taken over from the folders.
        parameters: our name to its number of elements.
    """

    loaded: dict[str, Origin] = field(default_factory=dict)
    random: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str, str]] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report as text: a table of our parts, what was left out and why, and the sizes that were taken over."""
        rows: dict[str, Counter[str]] = {}
        for name, count in self.parameters.items():
            kind = 'loaded' if name in self.loaded else 'random'
            rows.setdefault(name.split('.')[0], Counter()).update({kind: 1, f'{kind}_elements': count})
        table = [f'{"part":28}{"loaded":>16}{"random":>16}   million elements (tensors)']
        table += [
            f'{part:28}' + ''.join(f'{found[f"{kind}_elements"] / 1e6:>9.1f} ({found[kind]:>4})' for kind in ('loaded', 'random'))
            for part, found in rows.items()
        ]
        unaccounted = set(self.parameters) - set(self.loaded) - set(self.random)
        table.append(f'missing {len(unaccounted)}; a folder with a missing, unexpected or misshapen tensor would have been refused')
        reasons = Counter((part, reason) for part, _, reason in self.left_out)
        table += [f'left out of {part}: {count} tensors ({reason})' for (part, reason), count in sorted(reasons.items())]
        return [*table, *(f'taken over: {line}' for line in self.sizes)]


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict without the word logits where they are tied to the word embedding: transformers ties them again."""
    tied = bool(getattr(model.config.text_config, 'tie_word_embeddings', False))
    return {name: value for name, value in model.state_dict().items() if not (tied and name == f'{LANGUAGE}.lm_head.weight')}


def plan(target: Mapping[str, Tensor], sources: Mapping[str, Source], built_vision_layers: int) -> Report:
    """Match the folders with the network's state dict.

    Args:
        target: the tensors to store (`stored_tensors`); only names and shapes are used, so that they may lie on the meta device.
        sources: ``language``, ``vision``, ``geometry`` (`rules.PARTS`) to folders; any subset.
        built_vision_layers: layers of the vision tower; a source's layers behind them are left out.

    Raises:
        WeightsError: a folder lacks a tensor of its part, has one that no rule knows, or one of another shape; the message lists
            them by name.
    """
    report = Report(parameters={name: value.numel() for name, value in target.items()})
    unexpected, misshapen = [], []
    # A tower given by itself comes before one that a language folder brings along.
    for part in ('vision', 'geometry', 'language'):
        if part not in sources:
            continue
        source = sources[part]
        for name, tensor in source.tensors.items():
            try:
                ours, reason = translate(part, name)
            except KeyError:
                unexpected.append(f'{part}: {name}')
                continue
            if ours is not None:
                reason = _why_not(part, ours, target, sources, built_vision_layers)
            if ours is None or reason:
                report.left_out.append((part, name, reason))
            elif ours not in target:
                unexpected.append(f'{part}: {name} (would be {ours})')
            elif ours in report.loaded:
                unexpected.append(f'{part}: {name} (a second {ours}, beside {report.loaded[ours].name})')
            elif tuple(target[ours].shape) != tensor.shape:
                misshapen.append(f'{part}: {name} is {list(tensor.shape)}, the network has {list(target[ours].shape)}')
                report.loaded[ours] = Origin(part, name)
            else:
                report.loaded[ours] = Origin(part, name)
    missing = _missing(target, sources, report)
    _refuse(missing, unexpected, misshapen)
    report.random = [name for name in target if name not in report.loaded]
    return report


def _why_not(
    part: str, ours: str, target: Mapping[str, Tensor], sources: Mapping[str, Source], built_vision_layers: int
) -> str:
    """Why a known tensor is not used, or ''."""
    layer = re.match(rf'{VISION}\.encoder\.layers\.(\d+)\.', ours)
    if layer and int(layer[1]) >= built_vision_layers:
        return 'behind the feature layer'
    if ours == f'{LANGUAGE}.lm_head.weight' and ours not in target:
        return 'tied to the word embedding'
    if part != 'language' or ours.startswith(f'{LANGUAGE}.'):
        return ''
    if ours.startswith(f'{VISION}.') and 'vision' in sources:
        return 'the vision folder has the tower'
    theirs, mine = (any(name.endswith(CLIP_ONLY) for name in names) for names in (sources[part].tensors, target))
    if theirs != mine and not (ours.startswith(f'{PROJECTOR}.') and mine):
        return f'belongs to a {"CLIP" if theirs else "SigLIP"} tower, which this network does not have'
    if ours.startswith(f'{PROJECTOR}.') and f'{PROJECTOR}.2.weight' not in target:
        return 'a two-layer projector, which this network does not have'
    return ''


def _missing(target: Mapping[str, Tensor], sources: Mapping[str, Source], report: Report) -> list[str]:
    """Tensors of a part that has a folder (or has begun to be loaded) which none provides."""
    begun = {MAIN_PART[part] for part in sources} | {name.split('.')[0] for name in report.loaded}
    return [name for name in target if name.split('.')[0] in begun and name not in report.loaded]


def _refuse(missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
    problems = []
    for label, names in (('missing', missing), ('unexpected', unexpected), ('of another shape', misshapen)):
        if names:
            more = f', and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
            problems.append(f'{len(names)} {label}: {", ".join(names[:SHOWN])}{more}')
    if problems:
        raise WeightsError(
            f'the folders do not fit the network; nothing was written. {"; ".join(problems)}. '
            'Give complete folders of the supported families, and sizes that match them'
        )
