"""What files hold, read within limits: arrays, archives, pickles, results of earlier runs. Knows no model."""

from convrewrite.stored.arrays import Archive, StoredArray, map_array, require_numbers, require_room
from convrewrite.stored.bounds import ExcessiveError, ForbiddenError, ForbiddenNameError, InstancesOnly
from convrewrite.stored.digests import raw_bytes, tensors_digest
from convrewrite.stored.numbers import NUMPY
from convrewrite.stored.result_cache import NOTHING_KEPT, ResultCache, RunCache
from convrewrite.stored.unpickling import LEGACY_MAGIC, is_base, names_asked, read_pickle

__all__ = [
    "LEGACY_MAGIC",
    "NOTHING_KEPT",
    "NUMPY",
    "Archive",
    "ExcessiveError",
    "ForbiddenError",
    "ForbiddenNameError",
    "InstancesOnly",
    "ResultCache",
    "RunCache",
    "StoredArray",
    "is_base",
    "map_array",
    "names_asked",
    "raw_bytes",
    "read_pickle",
    "require_numbers",
    "require_room",
    "tensors_digest",
]
