"""What is written, so that nothing is lost: scratch folders, and taking a place in one step. Light: torch is not imported."""

from convrewrite.folders.placing import nearest, put, resolved, write_new
from convrewrite.folders.scratch import Scratch, clear_collected, disk_full, require_room, temporary, told, unwritable
from convrewrite.folders.texts import read_text

__all__ = [
    "Scratch",
    "clear_collected",
    "disk_full",
    "nearest",
    "put",
    "read_text",
    "require_room",
    "resolved",
    "temporary",
    "told",
    "unwritable",
    "write_new",
]
