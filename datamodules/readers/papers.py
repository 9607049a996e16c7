"""Papers of a library or a dump, as the collection of one kind of task: see datamodules/papers."""

from __future__ import annotations

import logging
from pathlib import Path

from datamodules.papers.columns import parse_columns
from datamodules.papers.formats import FORMATS, files_of, read_papers
from datamodules.papers.library import EmptyLibrary, library_in
from datamodules.papers.splits import Splits
from datamodules.papers.views import VIEWS, EmptyView, ViewOptions
from datamodules.readers.collecting import read_into_memory
from datamodules.readers.rows import BadLines
from datamodules.records import Collection, Sink, UserError, check_choice

log = logging.getLogger(__name__)


class PapersReader:
    """Reader of a file of papers, or of a folder with such files: BibTeX, RIS, CSV, Excel, OpenAlex, PubMed, ...

    source: file, or folder whose files are parts of one library.
    view: "labels": queries are papers, the corpus is their labels. "citations": the papers that a paper cites, within
        the files. "searches": titles or keywords that find papers.
    format: one of FORMATS; by default recognised for each file.
    columns: names of the columns of a table, such as {"title": "Titel"}, if they are not the usual ones.
    split: "80/10/10", "2015", "2015/2018" or "given" (see Splits).
    labels, min_papers, definitions, search: see ViewOptions.
    on_error, quarantine: see BadLines.
    """

    def __init__(
        self,
        source: str,
        view: str = "labels",
        format: str = "",
        columns: dict[str, str] | None = None,
        split: str = "80/10/10",
        labels: list[str] | None = None,
        min_papers: int = 5,
        definitions: str = "",
        search: str = "title",
        on_error: str = "fail",
        quarantine: str | None = None,
    ):
        self.source, self.view = Path(source), check_choice("view", view, list(VIEWS))
        self.format = format and check_choice("format", format, list(FORMATS))
        self.columns, self.split = parse_columns(columns or {}), split
        self.labels, self.min_papers, self.definitions, self.search = labels or [], min_papers, definitions, search
        self._splits = Splits(split)
        self._options = ViewOptions(tuple(self.labels), min_papers, definitions, search)
        self.on_error, self.quarantine = check_choice("on_error", on_error, BadLines.POLICIES), quarantine

    def sources(self) -> list[Path]:
        """Return the files to read."""
        further = (Path(path) for path in (self.definitions, self.search) if path and Path(path).is_file())
        return [*files_of(self.source), *further]

    def read(self) -> Collection:
        """Read and check all files. Raises UserError with file, line and reason."""
        return read_into_memory(self.stream)

    def stream(self, sink: Sink) -> None:
        """Write the collection to a sink without holding it in memory. Raises UserError as `read` does."""
        with BadLines(self.on_error, self.quarantine) as bad, library_in(self._splits) as library:
            try:
                library.read(read_papers(files_of(self.source), bad, self.format, self.columns))
                view = VIEWS[self.view](library, self._options, bad)
            except (EmptyLibrary, EmptyView) as error:
                raise UserError(f"{self.source}: {error}") from error
            for reason, count in (library.left_out + view.left_out).items():
                log.warning("%s: left out: %s: %s", self.source, reason, f"{count:,}")
            view.stream(sink)
