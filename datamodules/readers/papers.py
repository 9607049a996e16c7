"""Turn the papers of a library or dump into a collection for one kind of task (see datamodules/papers)."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from datamodules.options import REQUIRED, option
from datamodules.papers.columns import parse_columns
from datamodules.papers.formats import FORMATS, files_of, read_papers, warn_of_unread
from datamodules.papers.library import EmptyLibrary, library_in
from datamodules.papers.splits import Splits
from datamodules.papers.views import VIEWS, EmptyView, ViewOptions
from datamodules.readers.collecting import SinkReader
from datamodules.readers.rows import BadLines
from datamodules.records import Sink, UserError, check_choice

log = logging.getLogger(__name__)


@dataclass
class PapersReader(SinkReader):
    """Reader of a file of papers, or of a folder with such files: BibTeX, RIS, CSV, Excel, OpenAlex, PubMed, ..."""

    source: str = option(REQUIRED, "file, or folder whose files form one library")
    view: str = option(
        "labels",
        "labels: queries are papers, and the corpus has their labels. citations: queries are papers, and the papers "
        "in the files that they cite are relevant. searches: titles or keywords find papers",
        choices=tuple(VIEWS),
    )
    format: str = option("", "format of all files; by default, the format of each file is recognised")
    columns: dict[str, str] | None = option(
        None, 'names of table columns, such as {"title": "Titel"}, if they differ from the usual ones'
    )
    split: str = option("80/10/10", "rule such as 80/10/10, 2015, 2015/2018 or given (see Splits)")
    labels: list[str] | None = option(None, "kinds of labels (see ViewOptions)")
    min_papers: int = option(5, "minimum number of papers per label")
    definitions: str = option("", "file with definitions of labels (see ViewOptions)")
    search: str = option("title", "title, keywords, or a file of queries (see ViewOptions)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format:
            check_choice("format", self.format, list(FORMATS))
        self.columns, self.labels = parse_columns(self.columns or {}), self.labels or []
        self._splits = Splits(self.split)
        self._options = ViewOptions(tuple(self.labels), self.min_papers, self.definitions, self.search)

    def sources(self) -> list[Path]:
        """Return the files to read."""
        further = (Path(path) for path in (self.definitions, self.search) if os.path.isfile(path))
        return [*files_of(Path(self.source)), *further]

    def write(self, sink: Sink, bad: BadLines) -> None:
        files = files_of(Path(self.source))
        warn_of_unread(Path(self.source), files)
        with library_in(self._splits) as library:
            try:
                library.read(read_papers(files, bad, self.format, self.columns))
                view = VIEWS[self.view](library, self._options, bad)
            except (EmptyLibrary, EmptyView) as error:
                raise UserError(f"{self.source}: {error}") from error
            for reason, count in (library.left_out + view.left_out).items():
                log.warning("%s: left out: %s: %s", self.source, reason, f"{count:,}")
            view.stream(sink)
