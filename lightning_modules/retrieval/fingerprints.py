"""What vectors on disk are known by: the model and the texts; and files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from datamodules.records import Document
from lightning_modules.encoders.base import Encoder


def fingerprint(encoder: Encoder) -> str:
    """Of an encoder's weights, arguments and vocabulary: equal for equal vectors, on any machine."""
    digest = hashlib.blake2b(digest_size=8)
    about = {name: str(value) for name, value in encoder.config.items()}
    shape = encoder.backbone.config  # what weights alone do not tell
    about |= {name: str(getattr(shape, name, None)) for name in ("model_type", "num_attention_heads", "hidden_act")}
    digest.update(json.dumps([type(encoder).__name__, about], sort_keys=True).encode())
    digest.update(json.dumps(sorted(encoder.tokenizer.get_vocab().items())).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def text_hash(documents: Iterable[Document], *keys: str) -> str:
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=12)
    for document in documents:
        digest.update(repr((document.title, document.text)).encode())
    return digest.hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of path when all of it is on the disk. On an error nothing is left."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
