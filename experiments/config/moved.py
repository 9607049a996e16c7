"""Paths of classes that have moved, so that old configurations still load.

The hash in the name of a run's folder uses the first path of a class, so a move does not change it.
"""

from __future__ import annotations

# old path -> present path, for classes that `_target_` may name
MOVED: dict[str, str] = {
    "lightning_modules.mining.sharing.SharingMiner": "lightning_modules.mining.miners.SharingMiner",
}


def current_path(path: str) -> str:
    """Return the present dotted path of a class."""
    return MOVED.get(path, path)


def with_first_paths(text: str) -> str:
    """Return JSON text with the first path of every moved class."""
    for old, new in reversed(MOVED.items()):
        text = text.replace(f'"{new}"', f'"{old}"')
    return text
