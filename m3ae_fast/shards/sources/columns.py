"""The columns of a table or of a dataset: their options, usual names and choice."""

from __future__ import annotations

from collections.abc import Sequence

from m3ae_fast.base.errors import UserError

NO_CAPTIONS = ""  # as the name of the column of captions: no captions are read, only fields
IMAGE_COLUMNS = ("file_name", "filename", "image", "image_path", "path", "filepath", "file", "picture")
CAPTION_COLUMNS = ("caption", "text", "title", "description", "sentence", "alt_text")
LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "target")
IMAGE_OPTION, CAPTION_OPTION = "--image-column", "--caption-column"  # options that name a column


class NoColumns(UserError):
    """Raised if a table has no column with a usual name. `columns`: the names of its columns, as text; `option`: the
    option that names the column."""

    def __init__(self, columns: Sequence[str], where: str, option: str) -> None:
        self.columns, self.option = ", ".join(columns) or "none", option
        found = f"has the columns {self.columns}; specify one of them with {option}" if columns else "has no columns"
        otherwise = f", or add {option} '' to read only fields" if option == CAPTION_OPTION and len(columns) > 1 else ""
        super().__init__(f"{where}: {found}{otherwise}")


def choose_column(columns: Sequence[str], named: str | None, usual: Sequence[str], option: str, where: str) -> str:
    """Return the column named by the user or, if none is named, the first one with a usual name. For messages:
    `option`, the option that names the column; `where`, the name of the table. Raises NoColumns if no column has a
    usual name, and UserError if the named column does not exist or occurs several times."""
    if named is not None and named not in columns:
        advice = f"; specify one of {', '.join(columns)}" if columns else ""
        raise UserError(f"{option} {named}: {where} has no such column{advice}")
    names = [named] if named else [column for name in usual for column in columns if column.lower() == name][:1]
    if not names:
        raise NoColumns(columns, where, option)
    same = [column for column in columns if column == named or (not named and column.lower() == names[0].lower())]
    if len(same) > 1:
        advice = f"specify one with {option}" if len(set(same)) == len(same) else "rename or remove all but one"
        raise UserError(f"{where}: has {len(same)} matching columns, {' and '.join(same)}; {advice}")
    return names[0]
