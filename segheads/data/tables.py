"""Images and labels that a table names: CSV or Parquet, one pair a row."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segheads.data.folders import check_file, named, normal
from segheads.data.lists import MISSING, read_text
from segheads.data.pairs import Pair
from segheads.errors import DataError, DataMissingError, PackageMissingError

ENDINGS = (".csv", ".parquet")
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}


def find_table(root: Path, split: str) -> Path | None:
    """The table of a split: the root itself, `SPLIT.csv` or `SPLIT.parquet` in it, or None.

    Args:
        root: A folder or a file.
        split: Name of the split.

    Raises:
        DataError: There are two.
    """
    if root.suffix.lower() in ENDINGS and not root.is_dir():
        return root
    found = [path for path in (root / f"{split}{ending}" for ending in ENDINGS) if path.exists()]
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1]} are both there; keep one")
    return found[0] if found else None


def table_pairs(table: Path, split: str) -> list[Pair]:
    """The pairs of one split that a table names, sorted by the image's path.

    The columns `image` and `label` hold paths, absolute or from the table's folder on; other columns are passed over.
    Where there is a column `split`, rows of another value are left out: `train` or `training` is the training set,
    `val`, `valid` or `validation` the validation set.

    Args:
        table: A .csv (UTF-8, commas, names of columns first) or .parquet.
        split: `"train"`, `"val"` or what else the column has.

    Raises:
        DataMissingError: The table, or a file of it, is not there; the message has the rows.
        DataError: A column is missing, a value is empty, an image stands twice, no row is of the split, or the table
            cannot be read.
        PackageMissingError: It is a .parquet file and pyarrow is not installed.
    """
    rows = list(_rows(table))
    columns = list(rows[0][1]) if rows else []
    if not rows:
        raise DataError(f"{table} has no rows; it should have the columns image and label and a row for each pair")
    if missing := [name for name in ("image", "label") if name not in columns]:
        raise DataError(
            f"{table} has no column {' and no column '.join(missing)}; its columns are {named(columns, MISSING)}"
        )
    if "split" in columns:
        mine = SPLITS.get(split, (split,))
        there = dict.fromkeys(str(row["split"]) for _, row in rows)
        rows = [(number, row) for number, row in rows if str(row["split"]).strip() in mine]
        if not rows:
            raise DataError(
                f"{table} has no row whose split is {' or '.join(mine)}; there are {named(list(there), MISSING)}"
            )
    elif table.stem.lower() not in SPLITS.get(split, (split,)):
        raise DataError(
            f"{table} has no column split, so it does not tell {split} from the rest; add one with train and val, or "
            f"keep two tables, train{table.suffix} and val{table.suffix}, in one folder and give that"
        )
    pairs: dict[Path, tuple[int, Path]] = {}
    gone = []
    for number, row in rows:
        files = []
        for kind in ("image", "label"):
            text = str(row[kind] or "").strip()
            if not text:
                raise DataError(f"{table} has no {kind} in row {number}; fill it in or take the row out")
            files.append(_find(table.parent, text))
            if not files[-1].exists() and not files[-1].is_symlink():
                gone.append(f"{text} ({kind} of row {number})")
        image, label = files
        if image in pairs:
            raise DataError(
                f"{table} has {row['image']} in row {number}, and before in row {pairs[image][0]}; keep one"
            )
        pairs[image] = (number, label)
    if gone:
        raise DataMissingError(
            f"{len(gone)} files of {table} are not there: {named(gone, MISSING)}; paths count from {table.parent} on"
        )
    for image, (_, label) in pairs.items():
        check_file(image, "an image file")
        check_file(label, "a label file")
    return sorted((image, label) for image, (_, label) in pairs.items())


def _find(folder: Path, text: str) -> Path:
    """The file of a path as the table writes it, or in another normal form of Unicode."""
    path = folder / text.replace("\\", "/") if "\\" in text and not (folder / text).exists() else folder / text
    if path.exists() or text.isascii() or not path.parent.is_dir():
        return path
    return next((other for other in path.parent.iterdir() if normal(other.name) == normal(path.name)), path)


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers, as a reader of the file would count from the line after the names on, and values by column."""
    if table.suffix.lower() == ".parquet":
        yield from enumerate(_read_parquet(table), 1)
        return
    text = read_text(table, "a table with the columns image and label")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        reader.fieldnames = [(name or "").strip() for name in reader.fieldnames or []]
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                raise DataError(
                    f"row {number} of {table} has not the {len(reader.fieldnames)} values of the others; a path with "
                    "a comma needs quotes"
                )
            yield number, row
    except csv.Error as error:
        raise DataError(f"{table} cannot be read as CSV: {error} in line {reader.line_num}") from error


def _read_parquet(table: Path) -> list[dict[str, Any]]:
    check_file(table, "a table with the columns image and label")
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise PackageMissingError(
            f'{table} needs pyarrow: pip install "segheads[parquet]", or write the table as .csv'
        ) from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(table).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{table} cannot be read as Parquet: {error}") from error
    return rows
