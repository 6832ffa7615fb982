"""Where a result goes besides ONNX: other forms, one file each, written and held to torch, and files in half precision."""

from convrewrite.exports.discovery import file_names, kinds_of_exports, named_exports
from convrewrite.exports.export import Export, Made, Source
from convrewrite.exports.writing import Judged, Reference, Written, in_slices, rehearse, require_no_file, write_all

__all__ = [
    "Export",
    "Judged",
    "Made",
    "Reference",
    "Source",
    "Written",
    "file_names",
    "in_slices",
    "kinds_of_exports",
    "named_exports",
    "rehearse",
    "require_no_file",
    "write_all",
]
