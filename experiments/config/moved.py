"""Classes that have moved, so that configurations saved under their old paths still load.

A class keeps its first path in the hash that names a run's folder: an old run is found again after a move.
"""

from __future__ import annotations

# Old path -> present path, for every class that a `_target_` may name.
MOVED: dict[str, str] = {
    "lightning_modules.mining.sharing.SharingMiner": "lightning_modules.mining.miners.SharingMiner",
}


def current_path(path: str) -> str:
    """Return the present dotted path of a class."""
    return MOVED.get(path, path)


def with_first_paths(text: str) -> str:
    """Return JSON text in which every moved class has the path it had first."""
    for old, new in reversed(MOVED.items()):
        text = text.replace(f'"{new}"', f'"{old}"')
    return text
