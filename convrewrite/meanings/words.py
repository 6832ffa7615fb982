"""What the name of an output, and of the module that gave it, says of what it means."""

import re
from dataclasses import dataclass
from typing import Literal

from convrewrite.modules import ROOT

WORDS: dict[Literal["size", "class", "vector"], re.Pattern[str]] = {
    "size": re.compile(
        r"b?box(es)?|reg|regress\w*|locs?|localization|coords?|coordinates?|offsets?|deltas?|landmarks?|ldmks?|lmks?"
        r"|key?points?|kpts?|points?|depths?|disp|disparit(y|ies)|flow|heat|heatmaps?|hm|pose|quat\w*|angles?|ages?"
        r"|dist|distances?|wh|xy|xyxy|xywh|cent(er|re)s?|images?|img|rgb|recon\w*|sr|normals?"
        r"|mu|logvars?|vars?|variances?|logstd|std|stddev|sigmas?|logsigmas?"
    ),
    "class": re.compile(
        r"logits?|class|classes|classif\w*|cls|scores?|prob|probs|probabilit\w*|labels?|categor\w*|seg|segm|segmentation"
    ),
    "vector": re.compile(r"embed\w*|emb|descriptors?|latents?|codes?"),
}  # fmt: skip
"""Words that name a kind, looked for in this order: a ``bbox_embed`` gives boxes and a ``class_embed`` classes."""

PLAIN_FEATURES = re.compile(r"features?|feats?")
"""Names of plain features, which count only for the output or module itself: as often a ``features`` holds a whole network."""

STAGES = re.compile(r"(entry|middle|exit)_?flow", re.IGNORECASE)
"""Stages of a network, as Xception calls them: no flow of pixels."""


MASKS = re.compile(r"masks_quer(y|ies)_logits")
"""One mask for each query, in models of transformers: each by itself, and no classes of which one is on top."""


@dataclass(frozen=True, slots=True)
class Hint:
    """Whether a name speaks of numbers whose size counts, of classes or of vectors, and the sentence that says so."""

    kind: Literal["size", "class", "vector"]
    reason: str


def hint_of(output: str, module: str) -> Hint | None:
    """What the innermost telling part of the output's name says, otherwise that of the module's path; None when no part does."""
    own = output.removeprefix(ROOT).strip(".")
    for path, what in ((own, "output"), (module, "module")):
        parts = [part for part in path.split(".") if part]
        for part in reversed(parts):
            kind = _kind_of(part, last=part == parts[-1])
            if kind is not None:
                return Hint(kind, f"its {what} is called {path!r}")
    return None


def _kind_of(part: str, *, last: bool) -> Literal["size", "class", "vector"] | None:
    if STAGES.fullmatch(part):
        return None
    if MASKS.fullmatch(part):
        return "size"
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part)]
    for kind, pattern in WORDS.items():
        if any(pattern.fullmatch(word) for word in words):
            return kind
    return "size" if last and any(PLAIN_FEATURES.fullmatch(word) for word in words) else None
