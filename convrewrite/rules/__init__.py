"""Rule files, and what they allow a site to become."""

from convrewrite.rules.files import builtin_rules, check, load_rule_file, resolve
from convrewrite.rules.options import (
    Candidate,
    RankRange,
    SearchSpace,
    Shortlist,
    allowed_variants,
    cost_of,
    refusal,
    require_structures,
    search_spaces,
    shortlist_of,
    subjects,
)
from convrewrite.rules.schema import Match, Protect, Require, Rule, RuleFile

__all__ = [
    "Candidate",
    "Match",
    "Protect",
    "RankRange",
    "Require",
    "Rule",
    "RuleFile",
    "SearchSpace",
    "Shortlist",
    "allowed_variants",
    "builtin_rules",
    "check",
    "cost_of",
    "load_rule_file",
    "refusal",
    "require_structures",
    "resolve",
    "search_spaces",
    "shortlist_of",
    "subjects",
]
