"""The units of work of `command` on a Ray cluster, which is an optional dependency: requirements/ray.txt.

Ray starts on this machine, or joins the cluster that ``RAY_ADDRESS`` names; this module only hands the units over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

Options = TypeVar('Options')


def on_ray(
    work: Callable[[Options, Path], str | None], options: Options, bags: Sequence[Path], cores: int
) -> Iterator[tuple[Path, str | None]]:
    """Each bag with what ``work`` says of it, as they are done; ``cores`` for each unit.

    Raises:
        ValueError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(f'--ray needs Ray ({error}): pip install -r requirements/ray.txt') from error
    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    try:
        shared = ray.put(options)
        unit = ray.remote(num_cpus=cores, max_retries=1)(work)
        running = {unit.remote(shared, bag): bag for bag in bags}
        while running:
            done, _ = ray.wait(list(running))
            for one in done:
                bag = running.pop(one)
                try:
                    yield bag, ray.get(one)
                except ray.exceptions.RayError as error:
                    yield bag, f'{bag}: its process on the cluster failed: {str(error).strip().splitlines()[-1]}'
    finally:
        ray.shutdown()
