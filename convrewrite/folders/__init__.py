"""Writing such that nothing is lost: scratch folders, and replacing what is in a place in one step. Light: torch is not
imported."""

from convrewrite.folders.given import given_path
from convrewrite.folders.lasting import scratch_of_cache, user_cache
from convrewrite.folders.placing import (
    made_aside,
    nearest,
    put,
    remove,
    require_idle,
    require_replaceable,
    require_room_beside,
    resolved,
    write_new,
)
from convrewrite.folders.scratch import (
    Scratch,
    cleared_later,
    disk_full,
    require_room,
    temporary,
    unwritable,
    write_errors,
)
from convrewrite.folders.texts import read_text

__all__ = [
    "Scratch",
    "cleared_later",
    "disk_full",
    "given_path",
    "made_aside",
    "nearest",
    "put",
    "read_text",
    "remove",
    "require_idle",
    "require_replaceable",
    "require_room",
    "require_room_beside",
    "resolved",
    "scratch_of_cache",
    "temporary",
    "unwritable",
    "user_cache",
    "write_errors",
    "write_new",
]
