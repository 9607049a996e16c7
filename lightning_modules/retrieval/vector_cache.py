"""Cache an encoder's vectors in memory or on disk, so that no text is encoded twice.

    FOLDER/<fingerprint of the encoder>/<hash of task, similarity, precision and the shard's texts>.npy    (n, D)

Shards are written atomically, so after a kill, encoding continues at the first missing shard. Ranks share the work, and
all of them need access to the folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.files import atomic_file, load_array
from datamodules.progress_lines import ProgressLines
from datamodules.records import Document, MiningPool, UserError
from lightning_modules.distributed.collectives import gather_rows, rank, together, world_size
from lightning_modules.distributed.signals import leave_if_asked
from lightning_modules.encoders.base import Encoder
from lightning_modules.losses import comparable
from lightning_modules.retrieval.compute import active_precision
from lightning_modules.retrieval.search import Advance, Shards, check_finite

log = logging.getLogger(__name__)

SHARD = 2048  # maximum number of texts per file, which is also the most that an interruption can lose
MIN_SHARD, NUM_SHARDS = 512, 64  # small corpora are split into up to NUM_SHARDS shards of at least MIN_SHARD texts
UNIT = 1024  # number of texts that a rank encodes at a time in memory
# Names of the settings in backbone_settings. They are listed here, because new versions of transformers add more.
SETTINGS = re.compile(
    "model_type|hidden_act|eps$|rope|window|local_attention|global_attn|layer_types|heads|^pad_token_id"
)
NUM_KEPT = 2  # number of results kept in memory: the last corpus and its queries


class VectorCache:
    """Encode texts, and reuse the vectors of texts that were encoded before.

    folder: folder for vectors that later commands reuse; by default, only the last two results are kept, in memory.
    similarity: "cosine" normalises the vectors.
    shard_size: maximum number of texts per file.
    token_budget: maximum number of tokens per forward pass.
    """

    def __init__(
        self,
        encoder: Encoder,
        folder: Path | None = None,
        *,
        similarity: str = "dot",
        shard_size: int = SHARD,
        token_budget: int | None = None,
    ):
        self.encoder, self.similarity = encoder, similarity
        self.shard_size, self.token_budget = shard_size, token_budget
        self._parent = Path(folder) if folder else None
        self._kept: OrderedDict[tuple, Shards] = OrderedDict()
        self._fingerprint: tuple[Any, str] | None = None  # state of the encoder, and its fingerprint

    @property
    def fingerprint(self) -> str:
        """The encoder's fingerprint."""
        state = encoder_state(self.encoder)
        if self._fingerprint is None or self._fingerprint[0] != state:
            self._fingerprint = state, fingerprint(self.encoder)
        return self._fingerprint[1]

    @property
    def folder(self) -> Path | None:
        """Folder of this encoder's vectors, or None if they are kept in memory."""
        return self._parent and self._parent / self.fingerprint

    def vectors(self, texts: Sequence[Document], task: str, name: str, advance: Advance | None = None) -> Shards:
        """Return the vectors (n, D) of all texts. All ranks call this together.

        task: task to encode the texts for.
        name: description of the texts, for messages.
        advance: callback for the number of texts in each encoded batch; by default, the progress is logged.
        Raises UserError for vectors that are not finite.
        """
        advance = advance or ProgressLines(f"encoding {name}", "texts", len(texts) // world_size()).advance
        if folder := self.folder:
            return self._from_disk(folder, texts, task, name, advance)
        key = text_hash(texts, task, active_precision(self.encoder.device)), encoder_state(self.encoder)
        if key not in self._kept:
            while len(self._kept) >= NUM_KEPT:  # before encoding, so that there is room for the new vectors
                self._kept.popitem(last=False)
            self._kept[key] = Shards([self._in_memory(texts, task, name, advance)])
        self._kept.move_to_end(key)
        return self._kept[key]

    def vectors_of_rank(
        self, texts: Sequence[Document], task: str, name: str, advance: Advance | None = None
    ) -> np.ndarray:
        """Return the vectors (n, D) of this rank's texts: texts[rank::world_size]."""
        return self.vectors(texts, task, name, advance).gather(np.arange(rank(), len(texts), world_size()))

    def remove(self) -> None:
        """Delete this encoder's vectors."""
        self._kept.clear()
        if (folder := self.folder) and rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)

    def _from_disk(
        self, folder: Path, texts: Sequence[Document], task: str, name: str, advance: Advance | None
    ) -> Shards:
        folder.mkdir(parents=True, exist_ok=True)
        # With few texts, smaller shards give every rank a share. The size cannot depend on the number of ranks, because
        # it determines the exact bits of the vectors.
        size = min(self.shard_size, max(MIN_SHARD, -(-len(texts) // NUM_SHARDS)))
        paths: list[Path] = []
        missing: deque[tuple[int, Path]] = deque()

        def missing_shards() -> Iterator[Sequence[Document]]:
            for number, first in enumerate(range(0, len(texts), size)):
                shard = texts[first : first + size]
                path = folder / f"{text_hash(shard, task, self.similarity, active_precision(self.encoder.device))}.npy"
                paths.append(path)
                if number % world_size() == rank() and not _is_intact(path, len(shard)):
                    missing.append((first, path))
                    yield shard

        def encode_missing() -> None:
            with closing(self._encode(missing_shards(), task, advance)) as encoded:
                for raw in encoded:
                    first, path = missing.popleft()
                    vectors = self._checked(raw, name, first)
                    with atomic_file(path) as file:
                        np.save(file, vectors)
                        file.write(_checksum(vectors))

        together(encode_missing)
        # Copy-on-write, because torch warns about arrays that are not writable.
        return Shards([load_array(path, "c") for path in paths])

    def _in_memory(self, texts: Sequence[Document], task: str, name: str, advance: Advance | None) -> np.ndarray:
        """Encode in units of UNIT texts, so that the bits do not depend on the number of ranks."""
        size = world_size()
        units = range(0, len(texts), UNIT)

        def encode_share() -> torch.Tensor:
            firsts = units[rank() :: size]
            groups = (texts[first : first + UNIT] for first in firsts)
            with closing(self._encode(groups, task, advance)) as encoded:
                pairs = zip(firsts, encoded, strict=True)
                share = [torch.from_numpy(self._checked(vectors, name, first)) for first, vectors in pairs]
            return torch.cat(share or [self.encoder.encode([], task)])

        share = together(encode_share)
        if size == 1:
            return share.numpy()
        gathered = gather_rows(share.to(self.encoder.device)).cpu().numpy()
        order = [first for r in range(size) for first in units[r::size]]
        vectors = np.empty_like(gathered)
        vectors[np.concatenate([np.arange(first, min(first + UNIT, len(texts))) for first in order])] = gathered
        return vectors

    def _encode(
        self, groups: Iterable[Sequence[Document]], task: str, advance: Advance | None
    ) -> Generator[torch.Tensor]:
        def after_batch(count: int) -> None:
            if advance:
                advance(count)
            if self._parent and world_size() == 1:  # complete shards are already on disk
                leave_if_asked()

        return self.encoder.encode_each(groups, task, token_budget=self.token_budget, advance=after_batch)

    def _checked(self, vectors: torch.Tensor, name: str, first: int) -> np.ndarray:
        """Prepare vectors for comparison. Raises UserError if any is not finite. first: number of the first vector."""
        compared = comparable(vectors, self.similarity).numpy()
        check_finite(compared, name, first)
        return compared


def vectors_of_pool(
    cache: VectorCache, pool: MiningPool, document_vectors: VectorCache | None = None
) -> tuple[Shards, Shards]:
    """Return the vectors of a pool's queries and documents. All ranks call this together.

    document_vectors: cache of another model's document vectors, by default `cache`.
    """
    source = document_vectors or cache
    documents = source.vectors(pool.corpus, source.encoder.document_task(pool.task), f"documents of {pool.name}")
    queries = cache.vectors(pool.queries, pool.task, f"queries of {pool.name}")
    check_same_size(queries[0], documents[0])
    return queries, documents


def check_same_size(queries: np.ndarray, documents: np.ndarray) -> None:
    """Raise UserError if the vectors of queries, (Q, D), and documents, (M, D), differ in size."""
    sizes = queries.shape[1], documents.shape[1]
    if sizes[0] != sizes[1]:
        raise UserError(f"document_vectors: expected {sizes[0]} dimensions, as in the queries' vectors, got {sizes[1]}")


def vectors_of_parts(cache: VectorCache, parts: Sequence[tuple[Sequence[Document], bool]], task: str) -> Shards:
    """Return the vectors (n, D) of several lists of texts, concatenated. All ranks call this together.

    parts: pairs of a list of texts, and whether they are documents (True) or queries (False) of the task.
    """
    document_task = cache.encoder.document_task(task)
    tasks = [document_task if are_documents else task for _, are_documents in parts]
    vectors = [cache.vectors(texts, each, f"texts of {task}") for (texts, _), each in zip(parts, tasks, strict=True)]
    return Shards([array for shards in vectors for array in shards])


def encoder_state(encoder: Encoder) -> tuple[Any, ...]:
    """Return a key that changes with an encoder's weights and arguments. It takes milliseconds, unlike a fingerprint.

    It includes sums of the parameters and buffers, because fused optimizers and changes through .data do not change
    their versions.
    """
    parameters = [*encoder.parameters(), *encoder.buffers()]
    versions = tuple((id(p), 0 if p.is_inference() else p._version) for p in parameters)
    with torch.no_grad():
        sums = torch.stack([p.sum(dtype=torch.float32) for p in parameters]).tolist()
    return repr(encoder.config), versions, tuple(sums)


def _is_intact(path: Path, count: int) -> bool:
    """Return whether a file has the vectors of `count` texts. Logs a warning if it is damaged."""
    if not path.is_file():
        return False
    try:
        vectors = load_array(path)
        with open(path, "rb") as file:
            file.seek(vectors.offset + vectors.nbytes)
            end = file.read()
        # Files written by earlier versions have no checksum.
        problem = "" if len(vectors) == count and end in (b"", _checksum(vectors)) else "its content was altered"
    except (OSError, ValueError, EOFError, TypeError, AttributeError) as error:
        problem = str(error)
    if problem:
        log.warning("%s is damaged (%s); encoding its texts again", path, problem)
    return not problem


def _checksum(vectors: np.ndarray) -> bytes:
    """Return a checksum to append to the vectors in a file. numpy ignores it."""
    return hashlib.blake2b(np.ascontiguousarray(vectors).data, digest_size=8).digest()


def fingerprint(encoder: Encoder) -> str:
    """Return a hash of an encoder's weights, arguments and tokenizer, the same on any machine.

    It includes the settings of the backbone that the weights do not determine.
    """
    digest = hashlib.blake2b(digest_size=8)
    arguments = {name: str(value) for name, value in encoder.config.items()}
    parts = [type(encoder).__name__, arguments, backbone_settings(encoder), tokenization(encoder.tokenizer)]
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def backbone_settings(encoder: Encoder) -> dict[str, Any]:
    """Return the settings of a backbone that affect its vectors but do not follow from its weights."""
    return {name: value for name, value in encoder.backbone.config.to_dict().items() if SETTINGS.search(name)}


def tokenization(tokenizer: Any) -> dict[str, Any]:
    """Return everything that determines the tokens of a text, such as vocabulary, normalisation and splitting rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {
            "class": type(tokenizer).__name__,
            "vocabulary": tokenizer.get_vocab(),
            "settings": tokenizer.init_kwargs,
        }
    content = json.loads(backend.to_str())
    return {key: value for key, value in content.items() if key not in ("version", "truncation", "padding", "decoder")}


def text_hash(documents: Iterable[Document], *keys: str) -> str:
    """Return a hash of the texts, and of `keys` that determine their vectors."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=12)
    for document in documents:
        digest.update(repr((document.title, document.text)).encode())
    return digest.hexdigest()
