"""Open-i, Indiana University (Demner-Fushman et al., 2016): ecgen-radiology/*.xml, or Kaggle's indiana_reports.csv and
indiana_projections.csv. One report is one patient.

Labels are the MeSH terms that people gave the report: what they do not name counts as absent.
"""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np

from cxr_jax.data.sources import maps
from cxr_jax.data.sources.films import Films, as_texts, no_states
from cxr_jax.data.sources.films.tables import (
    Columns,
    NoTableError,
    count_contradictions,
    find_tables,
    folder_of,
    read_view,
)
from cxr_jax.data.sources.image_files import BadNameError, split_name
from cxr_jax.data.sources.table import column_key, is_blank
from cxr_jax.errors import UserError

REPORTS, PROJECTIONS = ("indiana_reports*.csv",), ("indiana_projections*.csv",)
_FOLDERS = ("", "[Oo]pen*", "chest-xrays-indiana*", "indiana*")
_XML_FOLDERS = ("", "ecgen-radiology", "reports", "openi_xml", "*/ecgen-radiology")
_NOT_INDEXED = "noindexing"
_SECTIONS = ("comparison", "indication", "findings", "impression")


def read(data_root: Path, label_kind: str = "") -> Films:
    """Read Kaggle's two tables, else the reports in XML."""
    folder = folder_of(data_root)
    # Kaggle's edition names views; the XML does not.
    reports = find_tables(folder, REPORTS, _FOLDERS)[:1]
    projections = find_tables(folder, PROJECTIONS, _FOLDERS)[:1]
    if reports and projections:
        return _read_kaggle(data_root, reports[0], projections[0])
    for pattern in _XML_FOLDERS:
        for place in sorted(folder.glob(pattern)) if pattern else [folder]:
            if files := sorted(place.glob("*.xml")):
                return _read_xml(data_root, files)
    missing = "indiana_reports.csv with indiana_projections.csv and no ecgen-radiology/*.xml"
    raise NoTableError(f"{data_root}: holds no {missing}")


class _Reader:
    """Reads terms: headings and their qualifiers, `Thickening/pleura`, semicolons between."""

    def __init__(self) -> None:
        self.label_map = maps.load_map("openi_mesh")
        self._reader = self.label_map.reader()

    def states(self, terms: str) -> np.ndarray:
        # A qualifier may decide: thickening of the pleura or of a bronchus.
        names = []
        for term in filter(None, map(str.strip, terms.split(";"))):
            heading, *qualifiers = (part.strip() for part in term.split("/"))
            names += [heading, *(f"{heading}/{qualifier}" for qualifier in qualifiers)]
        # Nobody has read such a report for its terms.
        if not names or any(column_key(name) == _NOT_INDEXED for name in names):
            return no_states(1)[0]
        return self._reader.states(names)


def _read_kaggle(data_root: Path, reports: Path, projections: Path) -> Films:
    reader = _Reader()
    # ---- Reports, a row each ----
    texts = Columns(
        reports,
        ("uid",),
        ("MeSH", "Problems", "findings", "impression", "indication", "comparison"),
    )
    uids = texts.ids("uid")
    texts.check_once(uids, "the report")
    row_of = {uid: row for row, uid in enumerate(uids)}
    # Problems are the same terms without qualifiers.
    terms = texts["MeSH"] if "MeSH" in texts else texts["Problems"]
    states = [reader.states("" if is_blank(cell) else cell) for cell in terms]
    sections = {name: texts[name] for name in _SECTIONS}
    # ---- Films, with the report of each ----
    columns = Columns(projections, ("uid", "filename", "projection"))
    images, studies = columns.paths("filename"), columns.ids("uid")
    rows = [row_of.get(uid) for uid in studies]
    for row, report in enumerate(rows):
        if report is None:
            raise columns.error(row, f"{reports.name} has no report of this uid")
    written = [
        "\n".join(
            f"{name.upper()}: {cells[row]}"
            for name, cells in sections.items()
            if not is_blank(cells[row])
        )
        for row in range(len(texts))
    ]
    # ---- Joined by report ----
    return _films(
        data_root,
        (projections, reports),
        reader,
        images=images,
        studies=studies,
        views=columns.decode("projection", read_view, ""),
        states=np.array([states[row] for row in rows if row is not None]),
        lines=np.array(columns.lines),
        reports=[written[row] for row in rows if row is not None],
    )


def _read_xml(data_root: Path, files: list[Path]) -> Films:
    reader = _Reader()
    images, studies, states, reports = [], [], [], []
    without = 0
    for path in files:
        try:
            # Some thousand small files, all of them needed.
            tree = ElementTree.parse(path)
        except (ElementTree.ParseError, OSError) as error:
            raise UserError(f"{path}: not XML ({type(error).__name__})") from None
        uid = tree.find("uId")
        study = (uid.get("id", "") if uid is not None else "").removeprefix("CXR") or path.stem
        # Major terms are by people; automatic ones are a program's.
        terms = ";".join(filter(None, (term.text for term in tree.iter("major"))))
        names = [image.get("id", "") for image in tree.iter("parentImage")]
        without += not names
        if len(set(names)) < len(names):
            raise UserError(f"{path}: lists an image twice")
        # The report's labels on every film of it.
        for name in names:
            images.append(_path_of(name, path))
            studies.append(study)
            states.append(reader.states(terms))
            reports.append(
                "\n".join(
                    f"{part.get('Label', '')}: {' '.join(part.text.split())}"
                    for part in tree.iter("AbstractText")
                    if part.text and part.text.strip()
                )
            )
    # A folder of other XML would be an empty set.
    if not images:
        raise UserError(f"{files[0].parent}: no report lists an image")
    films = _films(
        data_root,
        (files[0].parent,),
        reader,
        images=images,
        studies=studies,
        views=["UNKNOWN"] * len(images),
        states=np.array(states),
        reports=reports,
    )
    left_out = {"reports without an image": without} if without else {}
    unknown = "the XML names no views (config.data.views=any)"
    return replace(films, left_out=left_out, notes=(*films.notes, unknown))


def _path_of(image_id: str, report_file: Path) -> str:
    """The path of an image by its id in a report."""
    # An id is a name: with a step in it the image would be another's.
    try:
        if "/" in image_id or "/".join(split_name(image_id)) != image_id:
            raise BadNameError("the id of an image is no name of a file")
    except BadNameError as reason:
        raise UserError(f"{report_file}: {reason}") from None
    return f"NLMCXR_png/{image_id}.png"


def _films(
    data_root: Path,
    tables: tuple[Path, ...],
    reader: _Reader,
    *,
    images: list[str],
    studies: list[str],
    views: list[str],
    states: np.ndarray,
    reports: list[str],
    lines: np.ndarray | None = None,
) -> Films:
    return Films(
        name="openi",
        root=data_root,
        ids=as_texts([image.rpartition("/")[2] for image in images]),
        images=as_texts(images),
        # One report a patient, by the authors.
        patients=as_texts(studies),
        studies=as_texts(studies),
        views=as_texts(views),
        splits=as_texts([""] * len(images)),
        states=states,
        reports=as_texts(reports),
        tables=tables,
        lines=lines,
        basis="MeSH terms of reports, by people",
        label_map=str(reader.label_map),
        image_folders=("images/images_normalized", "images*", "NLMCXR*", "*/images_normalized"),
        suffixes=(".dcm", ".jpg"),
        notes=("what the terms do not name counts as absent", *count_contradictions(states)),
    )
